"""The least time a machine can take: its own measured limits, and what a request must do.

A product takes at least its operations over the matrix rate and its bytes over the copy rate,
whichever is longer (Williams et al., Roofline, 2009). The floor of a stage is the sum over its
products; elementwise work, launches and the host are free in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pixart_rt.bench.counts import Product

RUNS = 9
_COPY = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes: far beyond the caches
_SIDE = {"cuda": 8192, "cpu": 1536}


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine reaches. dtype is the one of the matrix product."""

    copy_tb_per_s: float  # read plus written
    matmul_tflop_per_s: float
    dtype: str

    def seconds(self, products: Sequence[Product]) -> float:
        """The floor of these products."""
        return sum(
            product.times
            * max(
                product.flops / (self.matmul_tflop_per_s * 1e12),
                product.elements * self.itemsize / (self.copy_tb_per_s * 1e12),
            )
            for product in products
        )

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A large copy and a large square product of random numbers, RUNS times each.

    On a GPU the median, for its first runs may be above the clock it can hold; on a CPU the
    fastest, for other programs take their share of the rest.
    """
    side = _SIDE[device.type]
    product = 2 * side**3 / _product_seconds(side, device, dtype)
    bytes_moved = 2 * _COPY[device.type]
    return Rates(
        bytes_moved / _copy_seconds(_COPY[device.type], device) / 1e12,
        product / 1e12,
        str(dtype).removeprefix("torch."),
    )


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    return _seconds(lambda: torch.mm(a, b), device)


def better(first: Rates, second: Rates) -> Rates:
    """The higher of each rate: a limit measured while something else ran is none."""
    return Rates(
        max(first.copy_tb_per_s, second.copy_tb_per_s),
        max(first.matmul_tflop_per_s, second.matmul_tflop_per_s),
        first.dtype,
    )


def floor(stages: dict[str, list[Product] | None], rates: Rates) -> dict[str, Any]:
    """Per stage: tflop, gigabytes, seconds; None for one that could not be counted."""
    return {
        name: None
        if products is None
        else {
            "tflop": sum(product.total_flops for product in products) / 1e12,
            "gb": sum(product.total_elements for product in products) * rates.itemsize / 1e9,
            "seconds": rates.seconds(products),
        }
        for name, products in stages.items()
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    for _ in range(2):
        function()
    times = []
    for _ in range(RUNS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return statistics.median(times) if device.type == "cuda" else min(times)
