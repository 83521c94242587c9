"""The pictures of a result, made from its JSON afterwards. A part that was not run has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu.report import GUIDED, PROMPT, seconds_of
from pixart_rt.bench.charts import (
    MARKERS,
    OURS,
    SMALL,
    THEIRS,
    colors_of,
    grouped_bars,
    legend_below,
    write_figure,
)


def write_plots(found: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """STEM-NAME.png for each of PLOTS that there are measurements of."""
    said = found["hardware"]["gpu"] or "a CPU, to try the script"
    return [
        write_figure(folder / f"{stem}-{name}.png", f"{name.capitalize()}, {said}",
                     partial(draw, found))
        for name, (there, draw) in PLOTS.items() if there(found)
    ]  # fmt: skip


def steps(found: dict[str, Any], figure: Figure) -> None:
    """Milliseconds a step, an axis for each size."""
    sizes = sorted({(row["pixels"], row["batch"]) for row in found["steps"]})
    loops = {quality: f"ours, whole loop in a graph, {quality}" for quality in ("high", "fast")}
    colors = colors_of([*(row["form"] for row in found["steps"]), *loops.values()])
    every = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, (pixels, batch) in zip(every, sizes, strict=True):
        rows = [row for row in found["steps"] if (row["pixels"], row["batch"]) == (pixels, batch)]
        values = {row["form"]: 1e3 * row["seconds"] for row in rows if "seconds" in row}
        for quality, label in loops.items():
            loop = seconds_of(found["loop"], pixels=pixels, images=batch // GUIDED,
                              quality=quality, prompt_tokens=PROMPT)  # fmt: skip
            if loop is not None:
                values[label] = 1e3 * loop
        grouped_bars(axes, {f"{pixels} px\n{batch} rows": values}, colors)
    every[0].set_ylabel("ms a step")
    legend_below(figure, 3)


def attention(found: dict[str, Any], figure: Figure) -> None:
    """TFLOP/s by head width; our kernel's at its own."""
    rows = found["limits"]["attention"]
    tokens = sorted({row["tokens"] for row in rows})
    colors = colors_of(row["backend"] for row in rows)
    every = figure.subplots(1, len(tokens), squeeze=False)[0]
    for axes, count in zip(every, tokens, strict=True):
        for k, (backend, color) in enumerate(colors.items()):
            points = [
                (row["head_dim"], row["tflop_per_s"])
                for row in rows
                if (row["backend"], row["tokens"]) == (backend, count) and "seconds" in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker=MARKERS[k], color=color,
                          label=backend)  # fmt: skip
        for row in found["kernels"]:
            mine = (row["operator"], row["shape"]) == ("attention_qkv_packed", f"2x{count}")
            if mine and not row["with_compiled"] and row["agrees"]:
                rate = row["flops"] / row["seconds"]["ours"] / 1e12
                axes.plot([72], [rate], "*", markersize=12, color=OURS[0], label="ours")
        axes.set_title(f"{count} tokens", fontsize=SMALL)
        axes.set_xlabel("head width")
        axes.set_ylim(bottom=0)
    every[0].set_ylabel("TFLOP/s, counted at the head's own width")
    legend_below(figure, 4)


def products(found: dict[str, Any], figure: Figure) -> None:
    """TFLOP/s of the model's products, by their rows."""
    axes = figure.subplots()
    rows = found["limits"]["products"]
    dtypes = sorted({row["dtype"] for row in rows})
    names = dict.fromkeys(row["product"] for row in rows)
    for name, color in zip(names, (*THEIRS, *OURS), strict=False):
        for dtype, style in zip(dtypes, ("solid", "dashed"), strict=False):
            points = sorted((row["m"], row["tflop_per_s"]) for row in rows
                            if (row["product"], row["dtype"]) == (name, dtype))  # fmt: skip
            axes.plot(*zip(*points, strict=True), linestyle=style, marker="o", markersize=3,
                      color=color, label=f"{name}, {dtype}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows")
    axes.set_ylabel("TFLOP/s")
    legend_below(figure, 4)


def kernels(found: dict[str, Any], figure: Figure) -> None:
    """How often our time goes into the others', batch of 2."""
    axes = figure.subplots()
    groups: dict[str, dict[str, float]] = {}
    for row in found["kernels"]:
        if not row["agrees"] or not row["against_float64"]:
            continue
        times = {k: v for k, v in row["seconds"].items() if not isinstance(v, str)}
        values = groups.setdefault(f"{row['operator']} {row['shape'].partition('x')[2]}", {})
        if "compiled" in times:  # the same again, later in the run, for this peer
            values["compiled"] = times["compiled"] / times["ours"]
            continue
        values["eager"] = times["eager"] / times["ours"]
        others = [value for name, value in times.items() if name not in ("ours", "eager")]
        if others:
            values["best other"] = min(others) / times["ours"]
    places = range(len(groups))
    for marker, form, color in zip(MARKERS, ("eager", "compiled", "best other"),
                                   THEIRS, strict=False):  # fmt: skip
        points = [(values[form], place) for place, values in enumerate(groups.values())
                  if form in values]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, label=form, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, list(groups), fontsize=5)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("its time over ours: right of the line ours is faster")
    legend_below(figure, 3)


def training(found: dict[str, Any], figure: Figure) -> None:
    axes = figure.subplots()
    groups: dict[str, dict[str, float]] = {}
    for row in found["training"]:
        if "seconds" in row:
            group = groups.setdefault(f"{row['pixels']} px, {row['batch']} images", {})
            group[row["form"]] = 1e3 * row["seconds"]
    grouped_bars(axes, groups, colors_of(row["form"] for row in found["training"]))
    axes.set_ylabel("ms a training step")
    legend_below(figure, 3)


Draw = Callable[[dict[str, Any], Figure], None]
PLOTS: dict[str, tuple[Callable[[dict[str, Any]], Any], Draw]] = {
    "steps": (lambda found: found["steps"], steps),
    "attention": (lambda found: found["limits"] and found["limits"]["attention"], attention),
    "products": (lambda found: found["limits"] and found["limits"]["products"], products),
    "kernels": (lambda found: found["kernels"], kernels),
    "training": (lambda found: [row for row in found["training"] if "seconds" in row], training),
}
