"""A measurement's four pictures: latencies, stages, images a second, place under the roofline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pixart_rt.bench.charts import MARKERS, SMALL, colors_of, legend_below, write_figure
from pixart_rt.bench.measure import CACHED, NEW
from pixart_rt.bench.stages import STAGES

KINDS = ("latency", "stages", "throughput", "roofline")
STAGE_COLORS = dict(zip(STAGES, ("#7b9e3f", "#1f5fa8", "#e08214", "#b0b0b0"), strict=True))
STAGE_NAMES = {"text_encoder": "text encoder", "vae_decoder": "VAE decoder"}
PERCENTILE_LINES: dict[int, Literal["solid", "dashed", "dotted"]] = {
    50: "solid",
    90: "dashed",
    99: "dotted",
}


def plot_paths(folder: Path, stem: str) -> list[Path]:
    """The files that write_plots writes."""
    return [folder / f"{stem}-{kind}.png" for kind in KINDS]


def write_plots(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """One PNG each of KINDS, `stem`-KIND.png in `folder`."""
    draw = {"latency": latency, "stages": stages, "throughput": throughput, "roofline": roofline}

    def drawn(kind: str, figure: Figure) -> None:
        draw[kind](figure.subplots(), result)

    return [
        write_figure(path, f"{kind.capitalize()}, {about(result, kind)}", partial(drawn, kind))
        for kind, path in zip(KINDS, plot_paths(folder, stem), strict=True)
    ]


def rows(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, color, series) of the first batch size: ours, ours cached, the peers."""
    batch = result["request"]["batches"][0]
    found = []
    for name, system in result["systems"].items():
        for series in system["series"]:
            if series["batch"] == batch:
                cached = series["prompts"] == CACHED
                found.append((f"{name}\ncached prompt" if cached else name, series))
    colors = colors_of(label for label, _ in found)
    return [(label, colors[label], each) for label, each in found]


def latency(axes: Axes, result: dict[str, Any]) -> None:
    """Every repetition as a dot; lines at the percentiles."""
    found = rows(result)
    for place, (_, color, series) in enumerate(found):
        values = series["latency_s"]
        # Repetitions go down in their row in the order they ran: a drift shows as a slope.
        heights = [place - 0.22 + 0.44 * (k + 0.5) / len(values) for k in range(len(values))]
        axes.scatter(values, heights, s=22, color=color, alpha=0.7, linewidths=0)
        for q, style in PERCENTILE_LINES.items():
            at, label = series[f"p{q}_s"], f"p{q}" if place == 0 else ""
            axes.vlines(at, place - 0.36, place + 0.36, colors=color, linestyles=style, label=label)
        axes.text(series["p50_s"], place - 0.39, f"{series['p50_s']:.3g} s", ha="center",
                  va="bottom", fontsize=SMALL)  # fmt: skip
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.7)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds from prompt to image")
    _legend(axes, 3)


def stages(axes: Axes, result: dict[str, Any]) -> None:
    """Mean seconds of each stage, stacked to the mean of the whole."""
    found = rows(result)
    whole = max(series["mean_s"] for _, _, series in found)
    for place, (_, _, series) in enumerate(found):
        left = 0.0
        for name in STAGES:
            seconds = series["stages_mean_s"][name]
            axes.barh(place, seconds, left=left, color=STAGE_COLORS[name], height=0.6,
                      label=STAGE_NAMES.get(name, name) if place == 0 else None)  # fmt: skip
            if seconds > 0.07 * whole:
                axes.text(left + seconds / 2, place, f"{seconds:.3g}", ha="center", va="center",
                          fontsize=SMALL, color="white")  # fmt: skip
            left += seconds
        axes.text(left + 0.01 * whole, place, f"{left:.3g} s", va="center", fontsize=SMALL)
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * whole)
    axes.set_xlabel("seconds, mean over the repetitions")
    _legend(axes, len(STAGES))


def throughput(axes: Axes, result: dict[str, Any]) -> None:
    """Images a second at the median latency, by images in a call; new prompts."""
    colors = {label: color for label, color, _ in rows(result)}
    for name, system in result["systems"].items():
        series = [each for each in system["series"] if each["prompts"] == NEW]
        axes.plot([each["batch"] for each in series], [each["images_per_s"] for each in series],
                  marker="o", color=colors[name], label=name)  # fmt: skip
    axes.set_xticks(result["request"]["batches"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a call")
    axes.set_ylabel("images a second")
    _legend(axes, len(colors))


def roofline(axes: Axes, result: dict[str, Any]) -> None:
    """The machine's limits, and each stage's rate where all systems do the plain way's work."""
    limits = result["roofline"]
    counted = {name: each for name, each in limits["floors"]["plain"].items() if each is not None}
    ridge = limits["matmul_tflop_per_s"] / limits["copy_tb_per_s"]  # FLOP a byte
    places = {name: 1e3 * each["tflop"] / each["gb"] for name, each in counted.items()}
    low, high = 0.5 * min([ridge, *places.values()]), 3 * max([ridge, *places.values()])
    copy, product = limits["copy_tb_per_s"], limits["matmul_tflop_per_s"]
    axes.plot([low, ridge, high], [low * copy, product, product], color="black", linewidth=1.2)
    new = [row for row in rows(result) if row[2]["prompts"] == NEW]
    for (name, place), marker in zip(places.items(), MARKERS, strict=False):
        for label, color, series in new:
            seconds = series["stages_mean_s"][name]
            axes.scatter(place, counted[name]["tflop"] / seconds, marker=marker, color=color, s=46,
                         label=f"{STAGE_NAMES.get(name, name)}, {label}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte, counted from the model")
    axes.set_ylabel("TFLOP/s, by the plain way's operations")
    said = f"{limits['matmul_dtype']} product {product:.3g} TFLOP/s"
    axes.text(high, product, said, ha="right", va="bottom", fontsize=SMALL)
    axes.text(low, low * copy, f"  copy {copy:.3g} TB/s", ha="left", va="top", fontsize=SMALL)
    _legend(axes, len(places))


def _legend(axes: Axes, columns: int) -> None:
    assert isinstance(axes.figure, Figure)
    legend_below(axes.figure, columns)


def about(result: dict[str, Any], kind: str) -> str:
    """What was measured, for a title."""
    asked, hardware = result["request"], result["hardware"]
    words = [asked["model"], f"{asked['width']}×{asked['height']}", f"{asked['steps']} steps"]
    if kind != "throughput":  # which is over the batch sizes
        words.append(f"batch {asked['batches'][0]}")
    gpu = asked["device"] == "cuda"
    return ", ".join([*words, hardware["gpu"] if gpu else _threads(asked["threads"])])


def _threads(count: int) -> str:
    return f"{count} CPU thread{'s' if count > 1 else ''}"
