"""Whether two systems made the same images: a comparison of different ones is worth nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WHITE = 255.0


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, float]:
    """Of pairs of 8-bit images: the lowest PSNR in dB, the largest mean and single difference.

    Equal images have a PSNR of infinity. Raises ValueError where sizes or counts differ.
    """
    if len(ours) != len(theirs) or any(a.size != b.size for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            f"images of {[image.size for image in ours]} and {[image.size for image in theirs]} "
            "pixels cannot be compared"
        )
    psnr, mean, largest = math.inf, 0.0, 0.0
    for first, second in zip(ours, theirs, strict=True):
        error = np.abs(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
        square = float(np.square(error).mean())
        psnr = min(psnr, 10 * math.log10(WHITE**2 / square) if square else math.inf)
        mean, largest = max(mean, float(error.mean())), max(largest, float(error.max()))
    return {"psnr_db": psnr, "mean_abs": mean, "max_abs": largest}


def worst(
    pairs: Sequence[dict[str, float]], others: Sequence[dict[str, float]], min_psnr: float
) -> dict[str, Any]:
    """Of all pairs of a run: the worst, and whether they agree.

    They do if the worst pair reaches `min_psnr` and is closer than any of `others`, which are pairs
    of different images: on a white background even those can have 30 dB. JSON has no infinity:
    equal images have the PSNR None.
    """
    psnr = min(each["psnr_db"] for each in pairs)
    unrelated = max(each["psnr_db"] for each in others)
    return {
        "images": len(pairs),
        "bound_psnr_db": min_psnr,
        "unrelated_psnr_db": _finite(unrelated),
        "psnr_db": _finite(psnr),
        "mean_abs": max(each["mean_abs"] for each in pairs),
        "max_abs": max(each["max_abs"] for each in pairs),
        "agrees": psnr >= min_psnr and psnr > unrelated,
    }


def _finite(psnr: float) -> float | None:
    return psnr if math.isfinite(psnr) else None
