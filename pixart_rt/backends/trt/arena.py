"""One block of device memory that all TensorRT engines of a pipeline work in, one after the other.

An engine's activations live in memory that its caller gives (USER_MANAGED). Text encoder,
transformer and VAE never run at the same time, so one block of the largest's size serves all. It
grows while engines are loaded; every context then gets the new address. Serves one thread.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from pixart_rt.errors import BackendError


class Tenant(Protocol):
    """Whoever works in an arena."""

    def use_memory(self, address: int, size: int) -> None:
        """Work in these `size` bytes from now on."""
        ...


class Arena:
    """The block of one device, the stream its engines fall back to, and the order of their work."""

    def __init__(self, device: torch.device) -> None:
        # For callers on the default stream, where TensorRT would synchronize.
        self.stream = torch.cuda.Stream(device)
        self.device = self.stream.device  # "cuda" gains its index
        self._memory: Tensor | None = None
        self._tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    @property
    def size(self) -> int:
        """Bytes of the block now."""
        return 0 if self._memory is None else self._memory.numel()

    def admit(self, tenant: Tenant, size: int) -> None:
        """Give a tenant `size` bytes or more. When the block must grow, all tenants move.

        Raises BackendError where the device has no such block; the arena is not usable then.
        """
        self._tenants.add(tenant)
        size = max(1, size)  # an engine without activations takes an address all the same
        if size <= self.size:
            self._place(tenant)
            return
        if self._memory is not None:
            torch.cuda.synchronize(self.device)  # whoever works in the old block; only at load
            self._memory = None  # first, so that both are never there
        try:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"no {size / 2**30:.1f} GiB of {self.device} are free for the engines' "
                "activations; free GPU memory, or build with a smaller --max-batch"
            ) from error
        for each in self._tenants:
            self._place(each)

    def _place(self, tenant: Tenant) -> None:
        assert self._memory is not None
        tenant.use_memory(self._memory.data_ptr(), self._memory.numel())

    def take(self, stream: torch.cuda.Stream) -> None:
        """Work queued on `stream` after this runs after all earlier work in the block.

        Queues nothing while the stream stays the same, as in a pipeline it does, so that work
        being captured into a CUDA graph gains no foreign dependency.
        """
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
