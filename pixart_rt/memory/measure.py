"""Peak memory of a call, measured: what was allocated beyond what was there when it began.

On a GPU the count is the caching allocator's own. On a CPU every allocation and release of
PyTorch's allocator is recorded, those inside an operator too (a library's scratch memory, a
flash attention's workspace), which hooks between operators would miss.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what is released during the call must not be older
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result  # alive until here: its memory counts
    recorded = trace.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, while they live.

    Sees no memory inside an operator, but runs on tensors without memory too (FakeTensorMode), so
    it tells what a model's own tensors take on a device that is not here. `peak` is in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Do not count these: weights and inputs."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._known.add(_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
