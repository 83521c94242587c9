"""The least time a machine can take: its own measured limits, and what a request must do.

A product takes at least its operations over the matrix rate and its bytes over the copy rate,
whichever is longer (Williams et al., Roofline, 2009). The floor of a stage is the sum over its
products; elementwise work, launches and the host are free in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pixart_rt.bench.counts import Product
from pixart_rt.bench.timing import elapsed, nbytes, samples
from pixart_rt.kernels.launch import SM80, SM89

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

    On a CPU the better of PyTorch's product and ONNX Runtime's: on two EPYC cores the latter was up
    to twice as fast (float32, November 2026).
    """
    products = [(side, _product_seconds(side, device, dtype)) for side in SIDES[device.type]]
    if device.type == "cpu" and dtype == torch.float32:
        products += [(side, _onnx_product_seconds(side)) for side in SIDES["cpu"]]
    return Rates(
        _copy_rate(device) / 1e12,
        max(2 * side**3 / seconds for side, seconds in products) / 1e12,
        str(dtype).removeprefix("torch."),
    )


def ceilings(device: torch.device) -> dict[str, float]:
    """A GPU's own limits: a large copy in TB/s (read plus written), products in TFLOP/s by dtype.

    Without a GPU there are none: a CPU's are `measure_rates`.
    """
    if device.type != "cuda":
        return {}
    found = {"copy_tb_per_s": _copy_rate(device) / 1e12}
    (side,), here = SIDES["cuda"], torch.cuda.get_device_capability(device)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        if here >= {torch.bfloat16: SM80, torch.float8_e4m3fn: SM89}.get(dtype, (0, 0)):
            rate = 2 * side**3 / _product_seconds(side, device, dtype) / 1e12
            found[f"matmul_{str(dtype).removeprefix('torch.')}_tflop_per_s"] = rate
    return found


def factors(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random a [M, K] and b [N, K] of `product`; in fp8 with scales of 1 for their rows."""
    a, b = (torch.randn(rows, K, device=device).to(dtype) for rows in (M, N))
    if dtype != torch.float8_e4m3fn:
        return a, b
    return a, b, torch.ones(M, 1, device=device), torch.ones(1, N, device=device)


def product(a: Tensor, b: Tensor, *scales: Tensor) -> Tensor:
    """a times the transpose of b, as a linear does; bfloat16 of fp8."""
    if not scales:
        return torch.mm(a, b.t())
    rows, columns = scales
    return torch._scaled_mm(
        a, b.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes([source]) / _seconds(lambda: target.copy_(source), device)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    operands = factors(side, side, side, dtype, device)
    return _seconds(lambda: product(*operands), device)


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


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """On a GPU the median, for its first runs may be above the clock it can hold; on a CPU the
    fastest, for other programs take their share of the rest.
    """
    times = samples({"": call}, partial(elapsed, device=device), repeats=RUNS, warmup=2)[""]
    return statistics.median(times) if device.type == "cuda" else min(times)
