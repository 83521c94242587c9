"""How every kernel is launched: whether it may run here, with which configuration, and how.

A launcher calls `launch(kernel, grid, ...)` and never the kernel itself, so that the code generator
of `benchmarks/codegen.py` can record what a launch would compile, on a machine without a GPU.

An operator runs its Triton kernel on tensors of a GPU of at least its compute capability, and in
Triton's interpreter (TRITON_INTERPRET=1) on tensors of the CPU; elsewhere, and where the start-up
self-test found a difference, its reference.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

SM70, SM80, SM89, SM90 = (7, 0), (8, 0), (8, 9), (9, 0)
TUNED = Path(__file__).resolve().parent / "tuned"  # shipped tables: one JSON an architecture


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch would compile: the kernel, its arguments in order, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_recorder: list[Launch] | None = None
_target: tuple[int, int] | None = None  # the GPU that `record` pretends to be
_forced: dict[str, dict[str, int]] = {}  # operator -> configuration, while it is tuned
_refused: dict[tuple[str, int], str] = {}  # (operator, device index) -> why its kernel is not used


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def capability(tensor: Tensor) -> tuple[int, int]:
    """The compute capability that a launch on `tensor` is for; (9, 0) in the interpreter."""
    if _target is not None:
        return _target
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else SM90


def runs_triton(op: str, tensor: Tensor, least: tuple[int, int]) -> bool:
    """Whether operator `op` runs its kernel on `tensor`; False means its reference."""
    if not tensor.is_cuda:
        return interpreting()
    return capability(tensor) >= least and (op, tensor.device.index or 0) not in _refused


def refuse(op: str, device: torch.device, reason: str) -> None:
    """Run the reference of `op` on this GPU from now on. The caller warns."""
    _refused[op, device.index or 0] = reason


def refused() -> dict[tuple[str, int], str]:
    """The kernels that are not used, (operator, GPU index), with the reasons."""
    return dict(_refused)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run kernel[grid](*args, **kwargs), or note it for `record`."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, kwargs))
    else:
        kernel[grid](*args, **kwargs)


@contextmanager
def record(target: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect the launches made inside, as for a GPU of compute capability `target`; run none."""
    global _recorder, _target
    assert _recorder is None, "record() does not nest"
    _recorder, _target = [], target
    try:
        yield _recorder
    finally:
        _recorder, _target = None, None


def token_bucket(tokens: int) -> int:
    """The power of two at or below a count of rows: what tuning tables are keyed by."""
    return 1 << (max(tokens, 1).bit_length() - 1)


def config(op: str, like: Tensor, tokens: int, default: dict[str, int]) -> dict[str, int]:
    """The launch configuration of `op`: tuned for this GPU, tuned for its family, or `default`.

    Tables map operator -> dtype -> token bucket -> configuration; the nearest smaller bucket, else
    the smallest, is taken, so that every count has one and nothing is tuned at run time.
    """
    if op in _forced:
        return {**default, **_forced[op]}
    if interpreting():
        return default
    name = _gpu_name(like.device.index or 0) if like.is_cuda and _target is None else ""
    for table in (_user_table(name), shipped_table(*capability(like))):
        buckets = table.get(op, {}).get(str(like.dtype).removeprefix("torch."), {})
        if buckets:
            sizes = sorted(int(size) for size in buckets)
            fits = [size for size in sizes if size <= tokens]
            return {**default, **buckets[str(fits[-1] if fits else sizes[0])]}
    return default


@contextmanager
def forcing(op: str, configuration: dict[str, int]) -> Iterator[None]:
    """Launch `op` with this configuration inside, whatever the tables say."""
    _forced[op] = configuration
    try:
        yield
    finally:
        del _forced[op]


def user_table_path(gpu: str) -> Path:
    """Where `pixart-rt tune` keeps the table of the GPU with this name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    safe = "".join(c if c.isalnum() else "-" for c in gpu.lower())
    return cache / "pixart_rt" / "tuned" / f"{safe}.json"


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _user_table(gpu: str) -> dict[str, Any]:
    return _read(user_table_path(gpu)) if gpu else {}


@functools.cache
def shipped_table(major: int, minor: int) -> dict[str, Any]:
    """The operators of the table that comes with the package for an architecture; {} if none."""
    return _read(TUNED / f"sm{major}{minor}.json")


def _read(path: Path) -> dict[str, Any]:
    """The operators of a table; none if there is no such file."""
    if not path.exists():
        return {}
    table: dict[str, Any] = json.loads(path.read_text())
    return table["operators"]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator as the self-test, the benchmarks and the code generator see it.

    `example(device, dtype, seed)` makes awkward inputs; `run` is the operator that chooses, and
    `reference` the plain PyTorch it must equal; both take those inputs and return tensors.
    """

    name: str
    least: tuple[int, int]  # compute capability
    run: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    trains: bool = True  # has gradients for every floating-point tensor
