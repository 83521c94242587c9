"""What must not happen inside a CUDA graph: touching the host's memory, waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
# Each gives the host a value, or sizes that depend on one. Tensor.item, bool() and float() are the
# first; indexing by a mask is nonzero.
WAITS = {
    _ATEN._local_scalar_dense, _ATEN.item, _ATEN.nonzero, _ATEN.nonzero_numpy, _ATEN.masked_select,
    _ATEN.unique_dim, _ATEN._unique2, _ATEN.unique_consecutive, _ATEN.equal, _ATEN.is_nonzero,
    _ATEN.repeat_interleave, _ATEN.allclose,
}  # fmt: skip


class NotCapturable(AssertionError):
    """An operator that a CUDA graph cannot hold, or that it would freeze."""


class CaptureClean(TorchDispatchMode):
    """Fails on operators that wait for the device and on those that touch a tensor of the CPU.

    For code on the meta device, which stands for a GPU: nothing else may take part. A number of a
    schedule that was made a tensor on the host and copied over is an error too, however small.
    `count` is of the operators seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if func.overloadpacket in WAITS and not _repeats_by_number(func):
            raise NotCapturable(f"{func} gives the host a value, which waits for the device")
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                raise NotCapturable(
                    f"{func} touches a tensor of the {tensor.device.type} of {tuple(tensor.shape)}"
                )
        return output


def _repeats_by_number(func: Any) -> bool:
    return func is _ATEN.repeat_interleave.self_int
