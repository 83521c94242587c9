"""Triton where it is installed; elsewhere names that let kernels be defined and never launched.

Inference on a CPU needs no kernel: every operator has its reference. So Windows and macOS, which
have no Triton, can import what the models are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Every attribute and every call of it is itself: decorators, constants, annotations."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # what copy, inspect and pytest ask of any object
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("a kernel was launched, but Triton is not installed")

    triton = tl = _Absent()

    @dataclass
    class TensorDescriptor:  # type: ignore[no-redef]
        """The fields that kernels/linear.py fills."""

        base: Any
        shape: list[int]
        strides: list[int]
        block_shape: list[int]


__all__ = ["HAS_TRITON", "TensorDescriptor", "tl", "triton"]
