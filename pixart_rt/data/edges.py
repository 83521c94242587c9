"""Edges of a picture, which a ControlNet is shown: Canny, or HED through controlnet-aux.

Canny (PAMI 8(6), 1986) on luma Y, 0..255:

    S = Gaussian(sigma) * Y,   g = (Sobel_x * S, Sobel_y * S) / 8,   m = |g|   grey levels a pixel
    thin     m is a maximum along ±g, interpolated between the pixels next to it
    kept     thin with m >= high, and thin with m >= low that touch one that is kept (of 8)

HED (arXiv:1504.06375) is what the paper's ControlNet was trained on; its values are 0..255.
H×W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixart_rt.errors import ConfigError

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Edges = npt.NDArray[np.uint8]  # [H, W], bright on black
Field = npt.NDArray[np.float64]  # [H, W]
EdgeFinder = Callable[[Pixels], Edges]

HED_WEIGHTS = "lllyasviel/Annotators"  # the repository that controlnet-aux's own examples name
HED_MULTIPLE = 64  # controlnet-aux rounds sides to it, each on its own
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
TIE = 1e-6  # grey levels; differences below it are rounding, not maxima


class EdgeKind(StrEnum):
    """How edges are found."""

    CANNY = "canny"
    """Thin lines, without a network."""
    HED = "hed"
    """Soft outlines, by a network; needs `pip install controlnet-aux`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canny:
    """An EdgeFinder whose edges are 0 or 255.

    sigma in pixels; low and high in grey levels a pixel. With the defaults a sharp edge of 13 grey
    levels may continue a line, and one of 52 begins one.
    """

    sigma: float = 1.0
    low: float = 4.0
    high: float = 16.0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ConfigError(f"sigma must be above 0 pixels, got {self.sigma}")
        if not 0 < self.low <= self.high:
            raise ConfigError(f"thresholds must be 0 < low <= high, got {self.low}, {self.high}")

    def __call__(self, pixels: Pixels) -> Edges:
        horizontal, vertical = gradients(pixels @ LUMA, self.sigma)
        magnitude = np.hypot(horizontal, vertical)
        thin = maxima(magnitude, horizontal, vertical)
        kept = connected(thin & (magnitude >= self.low), thin & (magnitude >= self.high))
        return np.where(kept, 255, 0).astype(np.uint8)


class Hed:
    """An EdgeFinder by controlnet-aux's HEDdetector, whose weights it downloads.

    Raises ConfigError where the package is not installed.
    """

    def __init__(self, weights: str = HED_WEIGHTS) -> None:
        try:
            from controlnet_aux import HEDdetector
        except ImportError as error:
            raise ConfigError(
                f"HED edges were requested, but controlnet-aux cannot be imported ({error}); "
                "pip install controlnet-aux, or use canny"
            ) from error
        self._weights, self._detector = weights, HEDdetector.from_pretrained(weights)

    def __repr__(self) -> str:
        return f"Hed({self._weights!r})"

    def __call__(self, pixels: Pixels) -> Edges:
        """The detector gets sides that are multiples of 64, both scaled alike, and no others."""
        height, width = pixels.shape[:2]
        factor = HED_MULTIPLE // math.gcd(HED_MULTIPLE, height, width)
        scaled = Image.fromarray(pixels).resize((factor * width, factor * height))
        shorter = factor * min(height, width)
        found = self._detector(
            scaled, detect_resolution=shorter, image_resolution=shorter, output_type="pil"
        )
        return np.asarray(found.convert("L").resize((width, height), Image.Resampling.BOX))


def edge_finder(kind: EdgeKind) -> EdgeFinder:
    """The finder of a kind, with its defaults."""
    return Canny() if kind is EdgeKind.CANNY else Hed()


def gradients(luma: Field, sigma: float) -> tuple[Field, Field]:
    """To the right and downwards, of the blurred picture; its border pixels go on for ever."""
    radius = math.ceil(4 * sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    smooth = _filtered(_filtered(luma, taps, 0), taps, 1)
    average, difference = np.array([1, 2, 1]) / 4, np.array([-1, 0, 1]) / 2
    horizontal = _filtered(_filtered(smooth, average, 0), difference, 1)
    return horizontal, _filtered(_filtered(smooth, average, 1), difference, 0)


def maxima(magnitude: Field, horizontal: Field, vertical: Field) -> npt.NDArray[np.bool_]:
    """Where the magnitude is not below its neighbours along the gradient, and above the one ahead.

    So of two equal pixels across an edge one is kept, and none of a ramp.
    """
    padded = np.pad(magnitude, 1)  # outside there is nothing: lines may end at the border
    height, width = magnitude.shape

    def beside(down: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> Field:
        rows, columns = np.indices((height, width), sparse=True)
        return padded[rows + 1 + down, columns + 1 + right]

    steep = np.abs(vertical) > np.abs(horizontal)
    longer = np.where(steep, np.abs(vertical), np.abs(horizontal))
    shorter = np.where(steep, np.abs(horizontal), np.abs(vertical))
    share = np.divide(shorter, longer, out=np.zeros_like(longer), where=longer > 0)
    right, down = np.sign(horizontal).astype(np.int64), np.sign(vertical).astype(np.int64)
    straight = np.where(steep, down, 0), np.where(steep, 0, right)
    ahead = (1 - share) * beside(*straight) + share * beside(down, right)
    behind = (1 - share) * beside(-straight[0], -straight[1]) + share * beside(-down, -right)
    return (magnitude > ahead + TIE) & (magnitude > behind - TIE) & (magnitude > TIE)


def connected(weak: npt.NDArray[np.bool_], strong: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The weak pixels that a chain of weak ones joins to a strong one, and the strong ones."""
    width = weak.shape[1] + 2
    open_ = np.pad(weak & ~strong, 1).ravel()
    kept = np.pad(strong, 1).ravel()
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(kept)
    while front.size:
        near = np.unique(front[:, None] + steps)
        front = near[open_[near]]
        open_[front] = False
        kept[front] = True
    return kept.reshape(-1, width)[1:-1, 1:-1]


def _filtered(values: Field, taps: Field, axis: int) -> Field:
    """Correlation along an axis, border values repeated."""
    radius = len(taps) // 2
    margins = [(radius, radius) if each == axis else (0, 0) for each in range(2)]
    padded = np.pad(values, margins, mode="edge")
    length = values.shape[axis]
    total = np.zeros(values.shape)
    for offset, tap in enumerate(taps):
        window = [slice(None), slice(None)]
        window[axis] = slice(offset, offset + length)
        total += tap * padded[tuple(window)]
    return total
