"""Compiled Triton kernels as TensorRT plugins hold them, and how each operator launches its own.

A kernel is compiled ahead of time for every target of an engine (export/plugins/compiler.py), and
the images travel inside the engine. Which argument is what is never written twice: an image lists
its parameters by the names they have in the kernel, in the order of the compiled code; what is
known at compile time has its value there, the rest comes from a `Launch` by name. Triton's code
ends in two more pointers, global and profile scratch, which must be present and are null here.

B images, N tokens, D width, R rows of a table, H heads, K head width. Imports no torch: the process
that builds engines imports this too.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pixart_rt.errors import BackendError, BundleError

NAMESPACE = "pixart_rt"  # of the nodes, and of the creators
VERSION = "1"
SCRATCH = 2  # hidden pointers at the end of Triton's code
KINDS: dict[str, Any] = {  # of a parameter, as PTX writes them
    "u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "f32": ctypes.c_float,
}  # fmt: skip
ALIGNMENT = 16  # bytes, of every address: the compiled code relies on it
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """Which kernel a node runs. Equal specs share one; the text form is the node's attribute."""

    op: str  # a key of OPERATORS
    dtypes: tuple[str, ...]  # of the node's inputs, such as "float16"
    sizes: tuple[int, ...]  # ln_modulate: D and R; attention_qkv_packed: H and K

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> KernelSpec:
        values = json.loads(text)
        return cls(op=values["op"], dtypes=tuple(values["dtypes"]), sizes=tuple(values["sizes"]))


class Parameter(NamedTuple):
    """One parameter of compiled code; `value` where it is known when compiling."""

    name: str
    kind: str  # a key of KINDS
    value: float | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelImage:
    """One kernel compiled for one GPU family, and all that launching it needs to know."""

    target: str  # such as "sm80"
    name: str  # of the entry in the binary
    num_warps: int
    shared_bytes: int  # dynamic shared memory
    rows: int  # tokens that one program handles
    parameters: tuple[Parameter, ...]  # without the scratch pointers
    binary: bytes  # a cubin


def pack(images: Sequence[KernelImage]) -> bytes:
    """Images as one piece of bytes: the length of a JSON header, the header, the binaries."""
    rows = []
    for image in images:
        row = asdict(image)
        row["binary"] = len(image.binary)
        rows.append(row)
    header = json.dumps(rows).encode()
    binaries = b"".join(image.binary for image in images)
    return len(header).to_bytes(4, "little") + header + binaries


def unpack(data: bytes) -> tuple[KernelImage, ...]:
    """What `pack` was given. Raises BundleError for bytes that are not whole."""
    end = 4 + int.from_bytes(data[:4], "little")
    images = []
    try:
        for row in json.loads(data[4:end]):
            start, end = end, end + row["binary"]
            row["binary"] = data[start:end]
            row["parameters"] = tuple(Parameter(*each) for each in row["parameters"])
            images.append(KernelImage(**row))
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(
            f"the kernels inside an engine are damaged ({error}); build the bundle again"
        ) from error
    if end > len(data):
        raise BundleError(
            f"the kernels inside an engine end after {len(data)} of {end} bytes; build the bundle "
            "again"
        )
    return tuple(images)


class Launch(NamedTuple):
    """One call of a kernel: its grid, and the arguments that a call decides, by name."""

    grid: tuple[int, int, int]
    values: dict[str, int]


class Operator(NamedTuple):
    """An operator that may be a plugin: its node in the graph, and how its kernel is launched.

    `launch(image, shape, row, inputs, output, workspace)` takes the first input's shape, the node's
    row and device addresses; `workspace_bytes(shape)` is for results that only a backward reads,
    where the kernel writes them in any case.
    """

    node: str
    launch: Callable[[KernelImage, Sequence[int], int, Sequence[int], int, int], Launch]
    workspace_bytes: Callable[[Sequence[int]], int]


def _ln_modulate(
    image: KernelImage,
    shape: Sequence[int],
    row: int,
    inputs: Sequence[int],
    output: int,
    workspace: int,
) -> Launch:
    """x [B, N, D], table [R, D] and shared [B, R, D] to y. No statistics: needs no workspace."""
    B, N, _ = shape
    values = dict(zip(("x_ptr", "table_ptr", "shared_ptr"), inputs, strict=True))
    values |= {"num_tokens": N, "row": row, "y_ptr": output}
    return Launch((math.ceil(N / image.rows), B, 1), values)


def _attention(
    image: KernelImage,
    shape: Sequence[int],
    row: int,
    inputs: Sequence[int],
    output: int,
    workspace: int,
) -> Launch:
    """qkv [B, N, 3, H, K], half precision, to [B, N, H·K]; the log-sum-exp is dropped."""
    B, N, _, H, _ = shape
    (qkv,) = inputs
    values = {
        "q_src": qkv, "kv_src": qkv, "num_queries": N, "num_keys": N,
        "out_ptr": output, "lse_ptr": workspace,
    }  # fmt: skip
    return Launch((math.ceil(N / image.rows), H, B), values)


def _attention_workspace(shape: Sequence[int]) -> int:
    B, N, _, H, _ = shape
    return FLOAT32_BYTES * B * H * N


OPERATORS = {
    "ln_modulate": Operator("LnModulate", _ln_modulate, lambda shape: 0),
    "attention_qkv_packed": Operator("AttentionQkvPacked", _attention, _attention_workspace),
}


def arguments(image: KernelImage, values: Mapping[str, int]) -> list[Any]:
    """The arguments of a launch as ctypes values in the code's order, scratch pointers included.

    Raises BackendError for an address that the code could not use.
    """
    known = {each.name for each in image.parameters if each.value is not None}
    needed = {each.name for each in image.parameters} - known
    assert needed == set(values), f"{image.name} takes {sorted(needed)}, got {sorted(values)}"
    for name, kind, _ in image.parameters:
        if kind == "u64" and values[name] % ALIGNMENT:
            raise BackendError(
                f"the engine put {name} of {image.name} at {values[name]:#x}, but the kernel needs "
                f"addresses that are multiples of {ALIGNMENT}; build the bundle without --plugins"
            )
    packed = [
        KINDS[kind](values[name] if value is None else value)
        for name, kind, value in image.parameters
    ]
    return [*packed, *(ctypes.c_uint64(0) for _ in range(SCRATCH))]
