"""One GPU, several benchmarks at once: they compile side by side and time one after the other.

A benchmark holds the GPU (`alone`) while it times, and nowhere else: not while it loads, compiles
or compares. torch.compile's own timings, of a kernel's forms against each other, take their turn
once `compiler_waits` was called. Turns are kept by a lock on the file that the environment variable
PIXART_RT_BENCH_LOCK names. Without it a benchmark runs by itself and nothing waits.

    python -m pixart_rt.bench.gpu_lock COMMAND ...     runs another program that has the GPU alone
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOCK = "PIXART_RT_BENCH_LOCK"


class _Turn:
    """This process's hold on the lock: how often it was taken and not yet given back."""

    def __init__(self) -> None:
        self.depth = 0
        self.file: int | None = None

    def take(self) -> None:
        if self.depth == 0 and os.environ.get(LOCK):
            if self.file is None:
                self.file = os.open(os.environ[LOCK], os.O_CREAT | os.O_RDWR)
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.depth += 1

    def give(self) -> None:
        self.depth -= 1
        if self.depth == 0 and self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_UN)
            time.sleep(0.001)  # or this process, awake, would take the next turn as well


_turn = _Turn()


@contextmanager
def alone() -> Iterator[None]:
    """No other benchmark times anything meanwhile. May be nested."""
    _turn.take()
    try:
        yield
    finally:
        _turn.give()


def compiler_waits() -> None:
    """Inductor's timings of kernels take their turn as well, from now on, where turns are kept."""
    if not os.environ.get(LOCK):
        return
    from torch._inductor.runtime import benchmarking

    settle = getattr(benchmarking, "set_gpu_benchmark_lock_context", None)
    if settle is not None:
        settle(alone)
        return
    # Before torch 2.13: one method times everything on a GPU.
    for kind in (benchmarking.TritonBenchmarker, benchmarking.InductorBenchmarker):
        if "benchmark_gpu" in vars(kind):
            kind.benchmark_gpu = _in_turn(kind.benchmark_gpu)  # type: ignore[method-assign]


def _in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with alone():
            return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    with alone():
        ran = subprocess.run(sys.argv[1:])
    raise SystemExit(ran.returncode)
