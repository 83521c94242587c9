"""Canny on shapes whose edges are known by arithmetic; how HED's package is called."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart_rt.data.edges import Canny, EdgeKind, connected, edge_finder, gradients
from pixart_rt.errors import ConfigError


def grey(values: np.ndarray) -> np.ndarray:
    """[H, W] to [H, W, 3] uint8."""
    return np.repeat(np.clip(np.rint(values), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def disk(size: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Antialiased, 200 on 40."""
    rows, columns = np.indices((size, size))
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return 40 + 160 * np.clip(radius - distance + 0.5, 0, 1)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.5])
@pytest.mark.parametrize("height", [30.0, 200.0])
def test_the_gradient_of_a_step_is_a_gaussian(sigma, height) -> None:
    """A blurred step is the normal's distribution function; its slope is the density."""
    luma = np.zeros((7, 101))
    luma[:, 50:] = height
    horizontal, vertical = gradients(luma, sigma)
    assert np.abs(vertical).max() < 1e-9
    # the difference of neighbours 2 apart, exactly: (Phi(x + 1) - Phi(x - 1)) / 2, x from the step
    place = np.arange(101) - 49.5
    phi = np.array(
        [[0.5 * math.erf((x + d) / sigma / math.sqrt(2)) for x in place] for d in (1, -1)]
    )
    expected = height * (phi[0] - phi[1]) / 2
    # taps at whole pixels stand for an integral over them: an error of order exp(-2 pi² sigma²)
    np.testing.assert_allclose(horizontal, np.broadcast_to(expected, (7, 101)), atol=0.012 * height)
    assert horizontal.max() == pytest.approx(expected.max(), rel=0.04)


def test_directions_and_scale_of_the_gradient() -> None:
    rows, columns = np.indices((40, 50))
    horizontal, vertical = gradients(3.0 * rows - 2.0 * columns, 1.5)
    inside = (slice(10, -10), slice(10, -10))
    np.testing.assert_allclose(horizontal[inside], -2.0, atol=1e-9)
    np.testing.assert_allclose(vertical[inside], 3.0, atol=1e-9)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_step_is_one_line_one_pixel_wide(turns) -> None:
    luma = np.full((33, 47), 20.0)
    luma[:, 30:] = 220
    edges = np.rot90(Canny()(grey(np.rot90(luma, turns))), -turns)
    assert edges.shape == (33, 47)
    lines = np.flatnonzero(edges.any(axis=0))
    assert len(lines) == 1 and lines[0] in (29, 30)
    assert (edges[:, lines[0]] == 255).all(), "to both borders"
    assert set(np.unique(edges)) == {0, 255}


@pytest.mark.parametrize(("radius", "centre"), [(20.3, (40.0, 41.5)), (33.0, (40.2, 39.7))])
def test_a_disk_has_its_circle(radius, centre) -> None:
    edges = Canny()(grey(disk(81, centre, radius)))
    rows, columns = np.nonzero(edges)
    distance = np.hypot(rows - centre[0], columns - centre[1])
    assert np.abs(distance - radius).max() < 1.0
    angles = np.sort(np.arctan2(rows - centre[0], columns - centre[1]))
    gaps = np.diff(np.append(angles, angles[0] + 2 * math.pi))
    assert gaps.max() * radius < 2.5, "closed: no two neighbours are further apart than a diagonal"
    # a thin line through square pixels has between 4 sqrt(2) r (corner steps) and 8 r pixels
    assert 4 * math.sqrt(2) * radius * 0.95 < len(rows) < 8 * radius


@pytest.mark.parametrize("slope", [0.0, 3.9, 10.0])
def test_a_ramp_has_no_edge_inside(slope) -> None:
    columns = np.indices((30, 25))[1]
    edges = Canny()(grey(slope * columns))
    assert not edges[:, 8:-8].any()


def test_a_step_below_the_threshold_is_no_edge() -> None:
    luma = np.full((20, 40), 100.0)
    luma[:, 20:] = 148  # peaks at 0.31 a grey level of the step: 14.8
    assert not Canny().__call__(grey(luma)).any()
    assert Canny(high=14)(grey(luma)).any()


def test_weak_lines_are_kept_where_they_continue_strong_ones() -> None:
    luma = np.full((90, 60), 100.0)
    luma[:, 30:] += np.linspace(90, 0, 90)[:, None]  # a step that fades: strong down to row 39
    luma[60:80, 5:15] = 122  # and one that is weak all around
    edges = Canny()(grey(luma))
    assert edges[:70, 28:32].any(axis=1).all(), "weak, and joined to the strong part"
    assert not edges[80:, 28:32].any(), "below the lower threshold"
    assert not edges[:, :20].any(), "weak alone"
    assert Canny(high=4)(grey(luma))[:, :20].any()


def test_connected_is_the_flood_of_the_strong() -> None:
    random = np.random.default_rng(0)
    for density in (0.2, 0.45, 0.6):
        weak = random.random((37, 53)) < density
        strong = weak & (random.random((37, 53)) < 0.02)
        expected = strong.copy()
        while True:  # one ring at a time, by hand
            padded = np.pad(expected, 1)
            rings = [padded[i : i + 37, j : j + 53] for i in range(3) for j in range(3)]
            grown = np.any(rings, axis=0) & weak
            if (grown == expected).all():
                break
            expected = grown
        assert strong.any()
        np.testing.assert_array_equal(connected(weak, strong), expected)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="sigma must be above 0"):
        Canny(sigma=0)
    with pytest.raises(ConfigError, match="0 < low <= high, got 9, 3"):
        Canny(low=9, high=3)


def test_hed_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(ConfigError, match="pip install controlnet-aux, or use canny"):
        edge_finder(EdgeKind.HED)


@pytest.mark.parametrize(("size", "scaled"), [((512, 2048), (512, 2048)), ((144, 496), (576, 1984)),
                                              ((352, 672), (704, 1344))])  # fmt: skip
def test_hed_is_called_at_sides_it_does_not_round(size, scaled, monkeypatch) -> None:
    """The detector is a stand-in: its weights are a download. What it is asked is the package's."""
    calls: list[dict[str, Any]] = []

    class HEDdetector:
        @classmethod
        def from_pretrained(cls, name: str) -> HEDdetector:
            assert name == "lllyasviel/Annotators"
            return cls()

        def __call__(
            self, image: Image.Image, detect_resolution: int, image_resolution: int,
            output_type: str,
        ) -> Image.Image:  # fmt: skip
            calls.append({"size": (image.height, image.width), "shorter": detect_resolution})
            assert image_resolution == detect_resolution and output_type == "pil"
            return image

    package = ModuleType("controlnet_aux")
    package.HEDdetector = HEDdetector
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    pixels = grey(np.linspace(0, 255, size[0] * size[1]).reshape(size))
    edges = edge_finder(EdgeKind.HED)(pixels)
    assert edges.shape == size and edges.dtype == np.uint8
    assert calls == [{"size": scaled, "shorter": min(scaled)}]
    assert all(side % 64 == 0 for side in scaled)
    assert np.abs(edges.astype(int) - pixels[..., 0]).max() <= 2, "the same picture comes back"
