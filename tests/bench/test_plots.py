"""Four pictures of one document: files that are images, and axes that hold all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pixart_rt.bench.plots import KINDS, latency, roofline, rows, stages, throughput, write_plots


def test_every_kind_is_a_png(measured: dict[str, Any], tmp_path: Path) -> None:
    written = write_plots(measured, tmp_path, "name")
    assert [path.name for path in written] == [f"name-{kind}.png" for kind in KINDS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 5, "something is drawn"


def test_rows_are_the_series_of_the_first_batch(measured: dict[str, Any]) -> None:
    found = rows(measured)
    assert [label for label, _, _ in found] == [
        "pixart_rt", "pixart_rt\ncached prompt", "diffusers"
    ]  # fmt: skip
    assert len({color for _, color, _ in found}) == 3
    assert all(series["batch"] == 2 for _, _, series in found)


def test_the_axes_hold_every_number(measured: dict[str, Any]) -> None:
    found = rows(measured)
    axes = Figure().add_subplot()
    latency(axes, measured)
    dots = [np.asarray(each.get_offsets())[:, 0] for each in axes.collections
            if len(each.get_offsets()) == 3]  # fmt: skip
    assert [sorted(each) for each in dots] == [sorted(s["latency_s"]) for _, _, s in found]

    axes = Figure().add_subplot()
    stages(axes, measured)
    ends: dict[float, float] = {}
    for patch in axes.patches:
        middle = round(patch.get_y() + patch.get_height() / 2, 6)
        ends[middle] = max(ends.get(middle, 0.0), patch.get_x() + patch.get_width())
    np.testing.assert_allclose([ends[k] for k in range(3)], [s["mean_s"] for _, _, s in found])

    axes = Figure().add_subplot()
    throughput(axes, measured)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    for name, system in measured["systems"].items():
        new = [each for each in system["series"] if each["prompts"] == "new"]
        assert drawn[name] == [each["images_per_s"] for each in new]

    axes = Figure().add_subplot()
    roofline(axes, measured)
    assert max(axes.lines[0].get_ydata()) == measured["roofline"]["matmul_tflop_per_s"]
    assert len(axes.collections) == 2 * 3, "three stages of two systems"
