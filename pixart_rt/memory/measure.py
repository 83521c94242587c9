"""Peak memory of a call, measured: the most bytes allocated beyond those held when it began.

On a GPU the count is the caching allocator's own. On a CPU every allocation and release of
PyTorch's allocator is recorded, those inside an operator too (a library's scratch memory, a
flash attention's workspace), which hooks between operators would miss.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that `call` held at once, its result included; inputs are the caller's."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _cpu_peak(call)


def _cpu_peak(call: Callable[[], Any]) -> int:
    from torch.autograd.profiler import profile  # torch.profiler's adds a second and a log to it

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # two lines on stderr for each call otherwise
    gc.collect()  # memory freed during the call must have been allocated by it
    with profile(profile_memory=True) as trace:
        result = call()
    del result  # alive until here: its memory counts
    recorded: Any = trace.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in recorded.events()
              if event.name() == "[memory]"]  # fmt: skip
    held = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most
