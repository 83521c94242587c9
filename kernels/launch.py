"""How every kernel is launched: whether it may run here, with which configuration, and how.

A launcher calls `launch(kernel, grid, ...)` and never the kernel itself, so that the code generator
of `benchmarks/codegen.py` can record what a launch would compile, on a machine without a GPU, and
so that it runs on the device of its tensors: Triton launches on the current device, which may be
another one.

An operator runs its Triton kernel on tensors of a GPU of at least its compute capability, and in
Triton's interpreter (TRITON_INTERPRET=1) on tensors of the CPU; elsewhere, and where the start-up
self-test found a difference, its reference.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.triton_import import HAS_TRITON, triton

SM70, SM80, SM89, SM90 = (7, 0), (8, 0), (8, 9), (9, 0)
TUNED = Path(__file__).resolve().parent / "tuned"  # shipped tables: one JSON an architecture


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch would compile: the kernel, its arguments in order, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(list[Launch]):
    """The launches of a `record`, and the configurations that `config` gave for them."""

    def __init__(self) -> None:
        super().__init__()
        self.configurations: dict[str, list[dict[str, int]]] = {}  # operator -> distinct ones


_recorder: Recording | None = None
_target: tuple[int, int] | None = None  # the GPU that `record` pretends to be
_target_name = ""
_forced: dict[str, dict[str, int]] = {}  # operator -> configuration, while it is tuned
_using: dict[str, Any] = {}  # a table that comes before all others, while it is made
_chosen: dict[str, str] = {}  # operator -> implementation, while implementations are compared
_told: set[tuple[str, str]] = set()  # (operator, implementation) that a warning was given of
_refused: dict[tuple[str, int], str] = {}  # (operator, device index) -> why its kernel is not used


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def capability(tensor: Tensor) -> tuple[int, int]:
    """The compute capability that a launch on `tensor` is for; (9, 0) in the interpreter."""
    if _target is not None:
        return _target
    return _capability(tensor.device.index or 0) if tensor.is_cuda else SM90


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def constant_result(function: Any) -> Any:
    """Mark what `torch.compile` shall call once, while it traces: its result is a constant.

    As torch.compiler.assume_constant_result does, which first imports torch._dynamo: two seconds
    that a process without a compiler need not wait.
    """
    function._dynamo_marked_constant = True
    return function


def exporting() -> bool:
    """Whether torch.export is tracing.

    torch.compiler.is_exporting, but for PyTorch 2.11, whose torch.compile takes that function for
    true in every graph.
    """
    return torch.compiler._is_exporting_flag


def runs_triton(op: str, tensor: Tensor, least: tuple[int, int]) -> bool:
    """Whether operator `op` runs its kernel on `tensor`; False means its reference."""
    if not tensor.is_cuda:
        return interpreting()
    if not HAS_TRITON:
        return False
    return capability(tensor) >= least and (op, tensor.device.index or 0) not in _refused


def refuse(op: str, device: torch.device, reason: str) -> None:
    """Run the reference of `op` on this GPU from now on. The caller warns."""
    _refused[op, device.index or 0] = reason


def refused() -> dict[tuple[str, int], str]:
    """The kernels that are not used, (operator, GPU index), with the reasons."""
    return dict(_refused)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run kernel[grid](*args, **kwargs) on the device of its tensors, or note it for `record`.

    An argument may be a tuple of tensors, descriptors and numbers.
    """
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, kwargs))
        return
    index = _device_index(args)
    if index is None or index == torch.cuda.current_device():
        kernel[grid](*args, **kwargs)
    else:
        with torch.cuda.device(index):
            kernel[grid](*args, **kwargs)


def _device_index(args: tuple[Any, ...]) -> int | None:
    """The GPU of the first tensor among the arguments; None for tensors of the CPU."""
    for arg in args:
        if isinstance(arg, tuple):
            index = _device_index(arg)
            if index is not None:
                return index
            continue
        tensor = getattr(arg, "base", arg)  # of a tensor descriptor
        if isinstance(tensor, Tensor):
            return tensor.device.index if tensor.is_cuda else None
    return None


def ceil_div(size: int, part: int) -> int:
    """How many parts cover size. triton.cdiv costs 10 µs of host time, its wrapper."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The next power of two, as triton.next_power_of_2 in less host time."""
    return 1 << (size - 1).bit_length()


_PLAIN = (Tensor, torch.nn.Parameter)


def direct(*tensors: Tensor | None) -> bool:
    """Whether an operator may call its launcher itself, past PyTorch's dispatcher.

    The dispatcher costs 15 to 25 µs a call, of an operator registered from Python; a step of XL has
    250 calls. It is needed where something listens (a compiler, a mode, vmap, a tensor that is no
    plain one or has no data) or a gradient is wanted.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_meta or (grad and tensor.requires_grad):
            return False
    return True


@contextmanager
def record(target: tuple[int, int], gpu: str = "") -> Iterator[Recording]:
    """Collect the launches made inside, as for a GPU of compute capability `target`; run none.

    With its name the GPU's own tuning table counts, not only its family's. Tensors may be meta.
    """
    global _recorder, _target, _target_name
    assert _recorder is None, "record() does not nest"
    _recorder, _target, _target_name = Recording(), target, gpu
    try:
        yield _recorder
    finally:
        _recorder, _target, _target_name = None, None, ""


def config(
    op: str, like: Tensor, shape: tuple[int, ...], default: dict[str, int]
) -> dict[str, int]:
    """The launch configuration of `op`: tuned for this GPU, tuned for its family, or `default`.

    `shape` is what an operator's time depends on: (rows,) for elementwise ones, (B·H, N) for
    attention, (rows, inputs, outputs) for matrix products. Tables map operator -> dtype -> shape
    ("32x4096") -> configuration; the nearest shape is taken (`nearest`), so that every one has a
    configuration and nothing is tuned at run time. Entries that a table does not name are
    `default`'s.
    """
    found = _forced.get(op)
    if found is None and (_target is not None or not interpreting()):
        found = _entry("operators", op, like.dtype, shape, gpu_name(like), capability(like))
    result = {**default, **found} if found else default
    if _recorder is not None:
        seen = _recorder.configurations.setdefault(op, [])
        if result not in seen:
            seen.append(result)
    return result


def choice(op: str, like: Tensor, shape: tuple[int, ...], default: str) -> str:
    """Which implementation of `op` runs: the one measured to be the fastest, or `default`.

    As `config`, from the tables' "choices": operator -> dtype -> shape -> name. Elsewhere than on a
    GPU it is `default`. The caller takes `default` where the named one cannot run.
    """
    if op in _chosen:
        return _chosen[op]
    if not like.is_cuda and _target is None:
        return default
    return _entry("choices", op, like.dtype, shape, gpu_name(like), capability(like)) or default


def nearest(shapes: Iterable[tuple[int, ...]], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The one of `shapes` whose sizes differ from `shape`'s by the smallest factors.

    The sum of |log2| of the ratios decides, and among equals the smaller shape.
    """
    return min(
        shapes,
        key=lambda each: (
            sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(each, shape, strict=True)),
            each,
        ),
    )


@functools.lru_cache(maxsize=4096)  # a request's shapes recur in every block and step
def _entry(
    kind: str, op: str, dtype: torch.dtype, shape: tuple[int, ...], gpu: str, arch: tuple[int, int]
) -> Any:
    """The nearest shape's entry of this GPU's own table, else of its family's; None if neither
    knows the operator in this dtype."""
    name = str(dtype).removeprefix("torch.")
    for table in (_using, _user_table(gpu), shipped_table(*arch)):
        entries = table.get(kind, {}).get(op, {}).get(name, {})
        if entries:
            known = {tuple(map(int, key.split("x"))): value for key, value in entries.items()}
            # Entries by other sizes are of an older version.
            known = {key: value for key, value in known.items() if len(key) == len(shape)}
            if known:
                return known[nearest(known, shape)]
    return None


def shape_key(shape: tuple[int, ...]) -> str:
    """A shape as the tables write it: "32x4096"."""
    return "x".join(map(str, shape))


def gpu_name(like: Tensor) -> str:
    """The name of the GPU that a launch on `like` is for; "" where there is none."""
    if _target is not None:
        return _target_name
    return _gpu_name(like.device.index or 0) if like.is_cuda else ""


@contextmanager
def using(table: dict[str, Any]) -> Iterator[None]:
    """Inside, this table's entries come before the user's and the shipped ones."""
    global _using
    before, _using = _using, table
    _entry.cache_clear()
    try:
        yield
    finally:
        _using = before
        _entry.cache_clear()


class Unavailable(RuntimeError):
    """An implementation was chosen by `choosing` that this machine does not have."""


def unavailable(op: str, implementation: str, why: str) -> None:
    """Say, once, that the default of `op` runs, not what a table names.

    Raises Unavailable where the implementation was chosen by `choosing` and not by a table.
    """
    if op in _chosen:
        raise Unavailable(f"{op} by {implementation} is not available: {why}")
    if (op, implementation) not in _told:
        _told.add((op, implementation))
        warnings.warn(
            f"a tuning table names {implementation} for {op}, which is not available: {why}; the "
            "default runs",
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def choosing(op: str, implementation: str) -> Iterator[None]:
    """Run this implementation of `op` inside, whatever the tables say."""
    _chosen[op] = implementation
    try:
        yield
    finally:
        del _chosen[op]


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
    """The table that comes with the package for an architecture; {} if none."""
    return _read(TUNED / f"sm{major}{minor}.json")


def forget_tables() -> None:
    """Read the tables anew at the next launch: one of them was written."""
    for memory in (_entry, _user_table, shipped_table):
        memory.cache_clear()


def _read(path: Path) -> dict[str, Any]:
    """A table, {} if there is no such file; also, with a warning, if it holds something else."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        valid = isinstance(table, dict) and isinstance(table.get("operators"), dict)
    except (OSError, ValueError):
        valid = False
    if not valid:
        warnings.warn(
            f"the tuning table {path} cannot be read, so the package's own is used; run "
            "`pixart-rt tune` again or delete it",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    result: dict[str, Any] = table
    return result


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator as the self-test, the benchmarks and the code generator see it.

    `example(device, dtype, seed)` makes awkward inputs; `run` is the operator that chooses, and
    `reference` the plain PyTorch it must equal; both take those inputs and return tensors.
    `production(device, dtype, seed)` makes inputs of XL's widths with few tokens. The self-test
    runs both kinds with every configuration of `tables` that real shapes select.
    """

    name: str
    least: tuple[int, int]  # compute capability
    run: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    trains: bool = True  # has gradients for every floating-point tensor
    production: Callable[[torch.device, torch.dtype, int], Iterable[tuple[Any, ...]]] = (
        lambda device, dtype, seed: ()
    )
    tables: tuple[str, ...] = ()  # what it asks `config` for: its own name if empty
