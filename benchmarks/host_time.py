"""Host time of our operators: microseconds from the call to a launch that runs nothing.

    python -m benchmarks.host_time                 prints a line an operator
    python -m benchmarks.host_time --json OUT      also writes them, with provenance

Needs no GPU: Triton's own path, with a driver that runs nothing (benchmarks/standin_driver.py). It
leaves out what NVIDIA's driver does in a launch, and counts the dispatcher, custom_op, the
launcher, tensor descriptors, and the CPU's allocator in place of CUDA's caching one. An eager
step is launch-bound where the sum over its operators is longer than the GPU's work.

Times are of this thread on the processor, of the fastest of many rounds: what the code needs when
nothing else runs. They are this machine's, and compare only with others of it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
from torch import Tensor

from benchmarks.standin_driver import standing_in
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.bench.timing import elapsed_by, samples
from pixart_rt.kernels.attention import attention_qkv_packed
from pixart_rt.kernels.cross_attention import cross_attention
from pixart_rt.kernels.gate_residual import gate_residual_ln_modulate
from pixart_rt.kernels.linear import linear_gate_residual
from pixart_rt.kernels.ln_modulate import ln_modulate

IMAGES, TOKENS, HEADS, WIDTH, TEXT = 2, 256, 16, 1152, 120  # XL/2 at 256 px with guidance


def microseconds(call: Callable[[], object], calls: int = 20, rounds: int = 100) -> float:
    """Of one call, the fastest round's; the first round, which compiles, is not one of them."""

    def run() -> None:
        for _ in range(calls):
            call()

    times = samples({"": run}, partial(elapsed_by, time.thread_time), repeats=rounds)[""]
    return min(times) / calls * 1e6


def operators(dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """A call of each operator that a block of XL/2 makes, at its shape."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, branch = empty(IMAGES, TOKENS, WIDTH), empty(IMAGES, TOKENS, WIDTH)
    table, shared = empty(6, WIDTH), empty(IMAGES, 6, WIDTH, dtype=torch.float32)
    weight, bias = empty(WIDTH, WIDTH), empty(WIDTH)
    head = WIDTH // HEADS
    qkv = empty(IMAGES, TOKENS, 3, HEADS, head)
    q, kv = empty(IMAGES, TOKENS, HEADS, head), empty(IMAGES, TEXT, 2, HEADS, head)
    mask = empty(IMAGES, TEXT, dtype=torch.bool)
    return {
        "ln_modulate": lambda: ln_modulate(x, table, shared, 0),
        "attention_qkv_packed": lambda: attention_qkv_packed(qkv),
        "cross_attention": lambda: cross_attention(q, kv, mask),
        "linear_gate_residual": lambda: linear_gate_residual(
            x, weight, bias, table, shared, 2, branch
        ),
        "gate_residual_ln_modulate": lambda: gate_residual_ln_modulate(
            x, branch, table, shared, 2, table, shared, 3
        ),
    }


def host_times(arch: tuple[int, int] = (9, 0)) -> dict[str, float]:
    """Microseconds of each of `operators`, in inference. For a process that interprets nothing."""
    calls = operators()
    with torch.no_grad(), standing_in(arch) as driver:
        for name, call in calls.items():
            before = driver.launches
            call()
            assert driver.launches > before, f"{name} launches no kernel"
        return {name: microseconds(call) for name, call in calls.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here")
    chosen = parser.parse_args().json
    found = host_times()
    for name, value in found.items():
        print(f"{name:28} {value:6.1f} us")
    if chosen is not None:
        ResultFile(chosen)({"microseconds": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
