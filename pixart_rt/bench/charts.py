"""The look of every picture: title above, legend below, one colour for each system.

`write_figure` makes the file; what is drawn in it comes from plots.py, and in a checkout from
benchmarks/gpu/plots.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pixart_rt.files import replacing

SIZE, DPI = (8.0, 4.5), 130  # inches
OURS = ("#1f5fa8", "#7fb2e5", "#123a68", "#4d94d6", "#a9cbee")
THEIRS = ("#e08214", "#8c6bb1", "#4d9221", "#8a8a8a", "#c9c9c9")
MARKERS = ("o", "s", "^", "D", "v")
SMALL, TITLE = 8, 9  # points


def write_figure(path: Path, title: str, draw: Callable[[Figure], None]) -> Path:
    """A PNG of what `draw` puts into a figure."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=TITLE)
    with replacing(path) as new:
        figure.savefig(new, format="png")
    return path


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Blues for forms of ours, in the order given; the other colours for everybody else's."""
    palettes = {True: iter(OURS * 3), False: iter(THEIRS * 3)}
    return {
        name: next(palettes[name.startswith(("ours", "pixart_rt"))])
        for name in dict.fromkeys(names)
    }


def legend_below(figure: Figure, columns: int) -> None:
    """Where no data can be, each label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        here = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {str(label): handle for handle, label in here}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns,
                  fontsize=SMALL, frameon=False)  # fmt: skip


def grouped_bars(axes: Axes, groups: dict[str, dict[str, float]], colors: dict[str, str]) -> None:
    """A group of bars for each label, in each a bar for each form in `colors`, its value on it."""
    forms = [form for form in colors if any(form in values for values in groups.values())]
    width = 0.84 / max(len(forms), 1)
    for k, form in enumerate(forms):
        for place, values in enumerate(groups.values()):
            if form not in values:
                continue
            x = place + (k - (len(forms) - 1) / 2) * width
            axes.bar(x, values[form], width=0.92 * width, color=colors[form])
            axes.text(x, values[form], f"{values[form]:.3g}", ha="center", va="bottom",
                      fontsize=SMALL - 2, rotation=90 if len(forms) > 4 else 0)  # fmt: skip
        axes.bar(0, 0, color=colors[form], label=form)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.16)
