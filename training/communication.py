"""How much of a step only communicates: from a torch.profiler trace of it.

    with profiled(device, meter.communication):
        step()

Communication that overlaps computation costs no time. So the share is the length of the time in
which a communication kernel runs and no other, over the time from the first kernel's begin to the
last one's end. A trace of one step costs milliseconds; take one for each log line, not each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

KERNELS = ("nccl", "gloo:", "c10d::")  # how names of communication begin, in lower case


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work, in any unit of time."""

    start: float
    stop: float
    communicates: bool


@contextmanager
def profiled(device: torch.device, report: Callable[[float], None]) -> Iterator[None]:
    """Around one step on a GPU: reports the share of its time that only communicates.

    Waits for the GPU before and after, so that no other step's kernels are in the trace.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as trace:
        yield
        torch.cuda.synchronize(device)
    report(exposed_share(device_spans(trace)))


def exposed_share(spans: Sequence[Span]) -> float:
    """The part of the whole time in which spans communicate and none computes; 0 of no spans."""
    if not spans:
        return 0.0
    whole = max(span.stop for span in spans) - min(span.start for span in spans)
    busy = _length(spans)
    computing = _length(span for span in spans if not span.communicates)
    return (busy - computing) / whole if whole > 0 else 0.0


def device_spans(trace: Any) -> list[Span]:
    """The kernels of a finished torch.profiler.profile, on all streams of this process's GPU."""
    return [
        Span(
            event.time_range.start,
            event.time_range.end,
            event.name.lower().startswith(KERNELS),
        )
        for event in trace.events()
        if event.device_type == DeviceType.CUDA
    ]


def _length(spans: Iterable[Span]) -> float:
    """Of the union of the spans."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(span.stop - max(span.start, end), 0.0)
        end = max(end, span.stop)
    return total
