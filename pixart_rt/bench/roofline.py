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
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # far beyond the caches
SIDES = {"cuda": (8192,), "cpu": (512, 1024)}  # of the product; a CPU's best is not its largest


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
    """A large copy and large square products of random numbers, RUNS times each.

    On a GPU the median, for its first runs may be above the clock it can hold; on a CPU the
    fastest, for other programs take their share of the rest, and of PyTorch's product and ONNX
    Runtime's: on two EPYC cores the latter was up to twice as fast (float32, November 2026).
    """
    size = COPY_BYTES[device.type]
    products = [(side, _product_seconds(side, device, dtype)) for side in SIDES[device.type]]
    if device.type == "cpu" and dtype == torch.float32:
        products += [(side, _onnx_product_seconds(side)) for side in SIDES["cpu"]]
    return Rates(
        2 * size / _copy_seconds(size, device) / 1e12,
        max(2 * side**3 / seconds for side, seconds in products) / 1e12,
        str(dtype).removeprefix("torch."),
    )


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    return _seconds(lambda: torch.mm(a, b), device)


def _onnx_product_seconds(side: int) -> float:
    """The same product by ONNX Runtime, with PyTorch's number of threads."""
    import onnxruntime
    from onnx import TensorProto, helper

    a, b, c = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [side, side]) for n in "abc")
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    model = helper.make_model(
        helper.make_graph([node], "product", [a, b], [c]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {name: torch.randn(side, side).numpy() for name in "ab"}
    return _seconds(lambda: session.run(None, inputs), torch.device("cpu"))


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
