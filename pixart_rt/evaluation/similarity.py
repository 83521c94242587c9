"""How alike two images are: PSNR, and SSIM as published (Wang et al., 2004, IEEE TIP 13(4)).

    PSNR = 10 log10(255² / mean (a - b)²)                              in dB, infinite if equal
    SSIM = mean of (2 μa μb + c1) (2 σab + c2) / ((μa² + μb² + c1) (σa² + σb² + c2))

with means, variances and covariance under an 11×11 Gaussian window of σ = 1.5 that stays inside the
image, c1 = (0.01·255)², c2 = (0.03·255)²; of colour images the mean over red, green and blue.

Images are [H, W, 3] of values in 0..255; all arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pixart_rt.errors import ConfigError

Pixels = NDArray[np.uint8] | NDArray[np.float64]
PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def mean_squared_error(a: Pixels, b: Pixels) -> float:
    """Of all values. Raises ConfigError for images of different shapes."""
    return float(np.mean((_checked(a, b) - b) ** 2))


def psnr_of(error: float) -> float:
    """The PSNR in dB that belongs to a mean squared error."""
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def psnr(a: Pixels, b: Pixels) -> float:
    """In dB; infinite for equal images. Raises as `mean_squared_error`."""
    return psnr_of(mean_squared_error(a, b))


def ssim(a: Pixels, b: Pixels) -> float:
    """Between -1 and 1, which is equality. Raises ConfigError for images smaller than the window,
    or of different shapes.
    """
    x, y = _checked(a, b), np.asarray(b, dtype=np.float64)
    if min(x.shape[:2]) < WINDOW:
        raise ConfigError(
            f"SSIM looks through a window of {WINDOW} pixels; the images are {x.shape[1]}x"
            f"{x.shape[0]}"
        )
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x**2
    var_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    size = (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return float(np.mean(likeness / size))


def _windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means [H-10, W-10, C] under the window, which is a column times a row."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis=axis) @ weights
    return values


def _checked(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    if a.shape != b.shape or a.ndim != 3:
        raise ConfigError(f"images [H, W, C] of one shape are compared, got {a.shape}, {b.shape}")
    return np.asarray(a, dtype=np.float64)
