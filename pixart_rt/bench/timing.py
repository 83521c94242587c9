"""Seconds of calls: warmed up, by the device's clock, in turn with each other, alone on the GPU.

`samples` is the one loop that times. `seconds_per_call` gives a kernel or a step to it as a CUDA
graph over rotated buffers. Where several benchmarks share a GPU they wait for each other here
(gpu_lock.py).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pixart_rt.bench.gpu_lock import alone

REPLAYS, SLOW_REPLAYS = 15, 5
SLOW = 0.5  # seconds of one replay, from which fewer are timed
RUN = 0.05  # seconds that calls in a row should take at least, for the host to run ahead

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], Any]


def mark(device: torch.device) -> Any:
    """The present moment: of the host, or on a GPU an event on the current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def between(first: Any, second: Any) -> float:
    """Seconds from one mark to another; on a GPU once the device has passed both."""
    if isinstance(first, float):
        return float(second - first)
    return float(first.elapsed_time(second)) / 1e3


def elapsed(call: Call, device: torch.device) -> float:
    """Seconds of one call by the device's clock."""
    first = mark(device)
    call()
    second = mark(device)
    settle(device)
    return between(first, second)


def elapsed_by(clock: Callable[[], float], call: Call) -> float:
    """Seconds of one call by a clock such as time.process_time."""
    began = clock()
    call()
    return clock() - began


def in_turn(items: Sequence[T], repeats: int, warmup: int) -> Iterator[tuple[int, T]]:
    """(repetition, item): all items in each repetition, and the next one begins with another.

    A machine's drift hits all alike. Repetitions of the warm-up have negative numbers.
    """
    for repetition in range(-warmup, repeats):
        start = repetition % len(items)
        for item in (*items[start:], *items[:start]):
            yield repetition, item


def samples(
    calls: Mapping[Name, Call],
    clock: Callable[[Call], float],
    *,
    repeats: int,
    warmup: int = 1,
) -> dict[Name, list[float]]:
    """Seconds of every repetition of each call but those of the warm-up."""
    found: dict[Name, list[float]] = {name: [] for name in calls}
    with alone():
        for repetition, name in in_turn(list(calls), repeats, warmup):
            seconds = clock(calls[name])
            if repetition >= 0:
                found[name].append(seconds)
    return found


def median_seconds(call: Call, device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """The median of `samples` of one call."""
    clock = partial(elapsed, device=device)
    return statistics.median(samples({"": call}, clock, repeats=repeats, warmup=warmup)[""])


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

    Call it once before if it compiles: here it already has the GPU alone. Without a GPU: the median
    of three plain calls, to try a benchmark, not to measure.
    """
    device = next(each.device for each in sets[0] if isinstance(each, Tensor))
    if device.type != "cuda":
        return median_seconds(lambda: function(*sets[0]), device, repeats=3, warmup=0)

    def run() -> None:
        for inputs in sets:
            function(*inputs)

    with alone():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is captured must have run on a stream of its own
            run()  # what is loaded at first use is not the call's
            slow = elapsed(run, device) > SLOW
        torch.cuda.current_stream().wait_stream(side)
        replay: Call = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            replay = captured.replay
        repeats = SLOW_REPLAYS if slow else REPLAYS
        warmup = 1 if slow else 2
        return median_seconds(replay, device, repeats=repeats, warmup=warmup) / len(sets)


def in_a_row(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Sequence[Any]]:
    """`inputs` as often as makes a run of RUN seconds, at most 20 times: between calls in a row the
    GPU does not wait for the host, as in a loop of steps. Calls the function once.
    """
    device = next((x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda), None)
    if device is None:
        return [inputs]
    seconds = elapsed(lambda: function(*inputs), device)
    return [inputs] * max(1, min(20, round(RUN / max(seconds, 1e-6))))


def start_afresh() -> None:
    """Forget what was compiled, and free the memory of what is no longer used."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
