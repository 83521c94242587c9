"""What the kernel tests launch, as text that another process can launch for a GPU.

In Triton's interpreter a launch is run; here it is also written down: the kernel's name, the types
of its arguments and its constants. Equal types are one launch: what Triton specializes a kernel
for (a dtype, an address or a number that 16 divides, the number 1) is what decides.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_rt.kernels import linear

Spec = dict[str, Any]  # of JSON's types


class Launches:
    """The distinct launches of kernels of pixart_rt, by their canonical text."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}

    def add(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        if not kernel.fn.__module__.startswith("pixart_rt."):
            return  # a test's own
        spec = {
            "kernel": encode(kernel)["function"],
            "grid": list(grid),
            "args": [encode(arg) for arg in args],
            "kwargs": {name: encode(value) for name, value in sorted(kwargs.items())},
        }
        constant = {name for name in kwargs if name.isupper()}
        named = {k: v if k in constant else _kind(v) for k, v in spec["kwargs"].items()}
        key = [spec["kernel"], [_kind(arg) for arg in spec["args"]], named]
        self.specs.setdefault(json.dumps(key), spec)

    def sorted(self) -> list[Spec]:
        return [spec for _, spec in sorted(self.specs.items())]


def encode(value: Any) -> Any:
    """An argument in JSON's types. Raises TypeError for one that is not known."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [encode(part) for part in value]}
    if isinstance(value, Tensor):
        return {"tensor": _name(_dtype(value)), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, TensorDescriptor):
        return {
            "descriptor": _name(_dtype(value.base)),
            "shape": list(value.shape), "strides": list(value.strides),
            "block": list(value.block_shape),
        }  # fmt: skip
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if callable(getattr(value, "fn", None)):  # a function that Triton compiles
        return {"function": [value.fn.__module__, value.fn.__qualname__]}
    raise TypeError(f"a launch has an argument of type {type(value).__name__}; encode it here")


def decode(value: Any) -> Any:
    """The argument of a launch that reads no memory: small tensors stand for all."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(decode(part) for part in value["tuple"])
    if "tensor" in value:
        memory = torch.empty(64, dtype=getattr(torch, value["tensor"]))
        return memory if value["aligned"] else memory[1:]
    if "descriptor" in value:
        memory = torch.empty(64, dtype=getattr(torch, value["descriptor"]))
        return TensorDescriptor(memory, value["shape"], value["strides"], value["block"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    module, name = value["function"]
    return getattr(importlib.import_module(module), name)


def _kind(value: Any) -> Any:
    """What of an encoded argument, no constant, can make Triton compile another variant."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):
        return [abs(value) < 2**31, value == 1, value % 16 == 0]
    if isinstance(value, dict) and "descriptor" in value:
        return [value["descriptor"], value["block"]]
    if isinstance(value, dict) and "tuple" in value:
        return [_kind(part) for part in value["tuple"]]
    return value


def _dtype(tensor: Tensor) -> torch.dtype:
    """Its dtype on a GPU."""
    return getattr(tensor, "stands_for", tensor.dtype)


def _widened(matrix: Tensor) -> Tensor:
    """What the interpreter multiplies in place of fp8, marked as what a GPU multiplies."""
    wide = matrix.float()
    wide.stands_for = matrix.dtype  # type: ignore[attr-defined]
    return wide


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def written_down(launches: Launches) -> Iterator[None]:
    """Add every launch in Triton's interpreter to `launches`, and run it."""
    run = InterpretedFunction.run

    def also(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            launches.add(self, grid, args, kwargs)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with (
        mock.patch.object(InterpretedFunction, "run", also),
        mock.patch.object(linear, "widened", _widened),
    ):
        yield
