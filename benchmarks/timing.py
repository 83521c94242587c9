"""Timing on a GPU: captured graphs over rotated buffers, medians, and the card's own ceilings."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.launch import SM89

REPLAYS, SLOW_REPLAYS = 15, 5
SLOW = 0.5  # seconds of one replay, from which fewer are timed
WARMUP = 3
RUN = 0.05  # seconds that calls in a row should take at least, for the host to run ahead


def nbytes(inputs: Sequence[Any]) -> int:
    """Bytes of the tensors among the inputs."""
    return sum(each.numel() * each.element_size() for each in inputs if isinstance(each, Tensor))


def rotations(device: torch.device, inputs: Sequence[Any]) -> int:
    """How many sets of inputs pass the L2 cache twice, so that no call finds its own in it."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(32, -(-2 * cache // max(nbytes(inputs), 1))))


def seconds_per_call(
    function: Callable[..., Any], sets: Sequence[Sequence[Any]], *, graph: bool = True
) -> float:
    """Median seconds of one call, over replays of a graph that calls it once on every set.

    Without a GPU: the median of three plain calls, to try a benchmark, not to measure.
    """
    device = next(each.device for each in sets[0] if isinstance(each, Tensor))
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function(*sets[0])
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def run() -> None:
        for inputs in sets:
            function(*inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is compiled or loaded at first use is not the call's
        slow = _elapsed(run) > SLOW
        for _ in range(0 if slow else WARMUP - 2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    replay: Callable[[], Any] = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    replay()
    times = [_elapsed(replay) / len(sets) for _ in range(SLOW_REPLAYS if slow else REPLAYS)]
    return statistics.median(times)


def _elapsed(run: Callable[[], Any]) -> float:
    """Seconds on the present stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_a_row(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Sequence[Any]]:
    """`inputs` as often as makes a run of RUN seconds, at most 20 times: between calls in a row the
    GPU does not wait for the host, as in a loop of steps. Calls the function once.
    """
    if not any(isinstance(each, Tensor) and each.is_cuda for each in inputs):
        return [inputs]
    return [inputs] * max(1, min(20, round(RUN / max(_elapsed(lambda: function(*inputs)), 1e-6))))


def start_afresh() -> None:
    """Forget what was compiled, and give back the memory of what is no longer used."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ceilings(device: torch.device) -> dict[str, float]:
    """The card's own limits: a large copy in TB/s (read plus written), products in TFLOP/s."""
    if device.type != "cuda":
        return {}
    source = torch.randn(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    found = {
        "copy_tb_per_s": 2 * nbytes([source])
        / seconds_per_call(lambda a, b: b.copy_(a), [(source, target)]) / 1e12
    }  # fmt: skip
    del source, target
    size, here = 8192, torch.cuda.get_device_capability(device)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        if here < {torch.bfloat16: (8, 0), torch.float8_e4m3fn: SM89}.get(dtype, (0, 0)):
            continue
        operands = factors(size, size, size, dtype, device)
        name = str(dtype).removeprefix("torch.")
        seconds = seconds_per_call(product, [operands])
        found[f"matmul_{name}_tflop_per_s"] = 2 * size**3 / seconds / 1e12
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
