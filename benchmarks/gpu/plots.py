"""The pictures of a result, made from its JSON afterwards. A part that was not run has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.report import GUIDED, PROMPT, seconds_of
from pixart_rt.files import replacing

SIZE, DPI = (8.0, 4.5), 130
THEIRS = ("#c9c9c9", "#8a8a8a", "#5c5c5c")
OURS = ("#9cc4ec", "#5b9bd5", "#1f5fa8", "#123a68", "#e08214", "#f3bd7c")
MARKERS = ("o", "s", "^", "D")


def write_plots(found: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """STEM-NAME.png for each of PLOTS that there are measurements of."""
    written = []
    for name, (there, draw) in PLOTS.items():
        if not there(found):
            continue
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        draw(figure, found)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        said = found["hardware"]["gpu"] or "a CPU, to try the script"
        figure.suptitle(f"{name}, {said}", fontsize=9)
        path = folder / f"{stem}-{name}.png"
        with replacing(path) as new:
            figure.savefig(new, format="png")
        written.append(path)
    return written


def bars(axes: Axes, groups: dict[str, dict[str, float]]) -> None:
    """A group of bars for each label, in each a bar for each form, its value on it."""
    forms = list(dict.fromkeys(form for values in groups.values() for form in values))
    theirs = [form for form in forms if form.startswith(("diffusers", "eager", "compiled", "best"))]
    ours = [form for form in forms if form not in theirs]
    colors = {form: THEIRS[k % len(THEIRS)] for k, form in enumerate(theirs)}
    colors |= {form: OURS[k % len(OURS)] for k, form in enumerate(ours)}
    width = 0.84 / max(len(forms), 1)
    for k, form in enumerate(forms):
        for place, values in enumerate(groups.values()):
            if form not in values:
                continue
            x = place + (k - (len(forms) - 1) / 2) * width
            axes.bar(x, values[form], width=0.92 * width, color=colors[form])
            axes.text(x, values[form], f"{values[form]:.3g}", ha="center", va="bottom",
                      fontsize=6, rotation=90 if len(forms) > 4 else 0)  # fmt: skip
        axes.bar(0, 0, color=colors[form], label=form)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.16)


def steps(figure: Figure, found: dict[str, Any]) -> None:
    """Milliseconds a step, an axis for each size."""
    sizes = sorted({(row["pixels"], row["batch"]) for row in found["steps"]})
    every = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, (pixels, batch) in zip(every, sizes, strict=True):
        rows = [row for row in found["steps"] if (row["pixels"], row["batch"]) == (pixels, batch)]
        values = {row["form"]: 1e3 * row["seconds"] for row in rows if "seconds" in row}
        for quality in ("high", "fast"):
            loop = seconds_of(found["loop"], pixels=pixels, images=batch // GUIDED,
                              quality=quality, prompt_tokens=PROMPT)  # fmt: skip
            if loop is not None:
                values[f"ours, whole loop in a graph, {quality}"] = 1e3 * loop
        bars(axes, {f"{pixels} px\n{batch} rows": values})
    every[0].set_ylabel("ms a step")
    handles: dict[str, Any] = {}
    for axes in every:
        found_here = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {str(label): handle for handle, label in found_here}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3,
                  fontsize=7, frameon=False)  # fmt: skip


def attention(figure: Figure, found: dict[str, Any]) -> None:
    """TFLOP/s by head width; our kernel's at its own."""
    rows = found["limits"]["attention"]
    tokens = sorted({row["tokens"] for row in rows})
    every = figure.subplots(1, len(tokens), squeeze=False)[0]
    for axes, count in zip(every, tokens, strict=True):
        for k, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            points = [
                (row["head_dim"], row["tflop_per_s"])
                for row in rows
                if (row["backend"], row["tokens"]) == (backend, count) and "seconds" in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker=MARKERS[k], color=THEIRS[k % 3],
                          label=backend)  # fmt: skip
        for row in found["kernels"]:
            mine = (row["operator"], row["shape"]) == ("attention_qkv_packed", f"2x{count}")
            if mine and not row["with_compiled"] and row["agrees"]:
                rate = row["flops"] / row["seconds"]["ours"] / 1e12
                axes.plot([72], [rate], "*", markersize=12, color=OURS[2], label="ours")
        axes.set_title(f"{count} tokens", fontsize=8)
        axes.set_xlabel("head width")
        axes.set_ylim(bottom=0)
    every[0].set_ylabel("TFLOP/s, counted at the head's own width")
    figure.legend(*every[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip


def products(figure: Figure, found: dict[str, Any]) -> None:
    """TFLOP/s of the model's products, by their rows."""
    axes = figure.subplots()
    rows = found["limits"]["products"]
    dtypes = sorted({row["dtype"] for row in rows})
    for k, name in enumerate(dict.fromkeys(row["product"] for row in rows)):
        for dtype, style in zip(dtypes, ("solid", "dashed"), strict=False):
            points = sorted((row["m"], row["tflop_per_s"]) for row in rows
                            if (row["product"], row["dtype"]) == (name, dtype))  # fmt: skip
            color = (*THEIRS, *OURS)[k]
            axes.plot(*zip(*points, strict=True), linestyle=style, marker="o", markersize=3,
                      color=color, label=f"{name}, {dtype}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows")
    axes.set_ylabel("TFLOP/s")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)


def kernels(figure: Figure, found: dict[str, Any]) -> None:
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
                                   (THEIRS[0], THEIRS[2], OURS[4]), strict=False):  # fmt: skip
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
    axes.legend(fontsize=8, frameon=False)


def training(figure: Figure, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    groups: dict[str, dict[str, float]] = {}
    for row in found["training"]:
        if "seconds" in row:
            group = groups.setdefault(f"{row['pixels']} px, {row['batch']} images", {})
            group[row["form"]] = 1e3 * row["seconds"]
    bars(axes, groups)
    axes.set_ylabel("ms a training step")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)


Draw = Callable[[Figure, dict[str, Any]], None]
PLOTS: dict[str, tuple[Callable[[dict[str, Any]], Any], Draw]] = {
    "steps": (lambda found: found["steps"], steps),
    "attention": (lambda found: found["limits"] and found["limits"]["attention"], attention),
    "products": (lambda found: found["limits"] and found["limits"]["products"], products),
    "kernels": (lambda found: found["kernels"], kernels),
    "training": (lambda found: [row for row in found["training"] if "seconds" in row], training),
}
