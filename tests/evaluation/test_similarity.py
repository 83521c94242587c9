"""PSNR and SSIM against their definitions, written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pixart_rt.errors import ConfigError
from pixart_rt.evaluation.similarity import psnr, ssim


def pair(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a noisy, darker copy of it."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = random.normal(-9, 25, image.shape)
    return image, np.clip(image * 0.8 + noise, 0, 255).astype(np.uint8)


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Every window on its own, variances as mean squared deviations; scalars only."""
    weights = {}
    for row in range(11):
        for column in range(11):
            distance = (row - 5) ** 2 + (column - 5) ** 2
            weights[row, column] = math.exp(-distance / (2 * 1.5 * 1.5))
    total = sum(weights.values())
    values = []
    height, width, channels = a.shape
    for top in range(height - 10):
        for left in range(width - 10):
            for channel in range(channels):
                window = [
                    (weight / total, float(a[top + i, left + j, channel]),
                     float(b[top + i, left + j, channel]))
                    for (i, j), weight in weights.items()
                ]  # fmt: skip
                mean_a = sum(w * x for w, x, _ in window)
                mean_b = sum(w * y for w, _, y in window)
                var_a = sum(w * (x - mean_a) ** 2 for w, x, _ in window)
                var_b = sum(w * (y - mean_b) ** 2 for w, _, y in window)
                both = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in window)
                c1, c2 = 6.5025, 58.5225
                values.append(
                    (2 * mean_a * mean_b + c1) * (2 * both + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )  # fmt: skip
    return sum(values) / len(values)


@pytest.mark.parametrize(("height", "width"), [(11, 11), (13, 18), (17, 12)])
def test_ssim_is_its_definition(height: int, width: int) -> None:
    for seed in (0, 1):
        a, b = pair(seed, height, width)
        assert ssim(a, b) == pytest.approx(ssim_by_loops(a, b), abs=1e-9)


def test_psnr_is_its_definition() -> None:
    a, b = pair(2, 9, 14)
    squares = [(int(x) - int(y)) ** 2 for x, y in zip(a.flat, b.flat, strict=True)]
    expected = 20 * math.log10(255) - 10 * math.log10(sum(squares) / len(squares))
    assert psnr(a, b) == pytest.approx(expected, abs=1e-9)


def test_an_image_equals_itself_and_order_does_not_matter() -> None:
    a, b = pair(3, 24, 20)
    assert psnr(a, a) == math.inf and ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert psnr(a, b) == psnr(b, a) and ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert ssim(a, b) < 0.99


def test_known_values() -> None:
    flat = np.full((12, 12, 3), 100, dtype=np.uint8)
    assert psnr(flat, flat + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)
    inverse = 255 - pair(4, 32, 32)[0]
    assert ssim(255 - inverse, inverse) < 0, "structure turned round"


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = pair(5, 12, 12)
    with pytest.raises(ConfigError, match="one shape"):
        psnr(a, b[:11])
    with pytest.raises(ConfigError, match="window of 11"):
        ssim(a[:10], b[:10])
