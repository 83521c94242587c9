"""Compile recorded launches for GPUs that are not there, and read what the compiler made of them.

Triton carries NVIDIA's assembler and disassembler, so registers, spills, shared memory and the
instructions of a kernel are known without a GPU. They say nothing about speed.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pixart_rt.kernels.launch import Launch

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
MNEMONICS = {  # what the table counts, and the instructions that it stands for
    "tensor_core": ("HMMA", "HGMMA", "QGMMA", "OMMA", "QMMA", "UTCHMMA", "UTCQMMA"),
    "async_copy": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "local_memory": ("LDL", "STL"),
    "wide_load": (),  # LDG.E.128, counted apart
}


@dataclass(frozen=True, slots=True)
class Resources:
    """One kernel, one GPU: what the assembler reports."""

    kernel: str
    arch: str  # sm_80
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int  # stores plus loads
    shared_bytes: int  # static plus dynamic
    instructions: dict[str, int]  # mnemonic -> count
    advisories: tuple[str, ...] = ()  # what ptxas says besides errors: "C7515", serialized wgmma

    def count(self, kind: str) -> int:
        """How many instructions of a kind of MNEMONICS."""
        return sum(self.instructions.get(name, 0) for name in MNEMONICS[kind])

    def to_dict(self) -> dict[str, Any]:
        kept = {name for names in MNEMONICS.values() for name in names} | {
            "LDG.128", "MUFU", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR",
        }  # fmt: skip
        mine = {k: v for k, v in sorted(self.instructions.items()) if k in kept}
        return {**asdict(self), "instructions": mine}


def compile_launch(launch: Launch, arch: tuple[int, int]) -> Resources:
    """Compile one recorded launch for sm_{arch} and read its resources.

    Raises whatever Triton raises for a kernel that does not compile there.
    """
    number = 10 * arch[0] + arch[1]
    source, options = ast_source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    bin_dir = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(bin_dir / "cuobjdump", "-res-usage", cubin)
        # The disassembler that comes with Triton no longer knows sm_70.
        sass = _run(bin_dir / "nvdisasm", "-c", cubin) if arch >= (7, 5) else ""
        ptx = Path(folder) / "k.ptx"
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        spills, advisories = _assembler(bin_dir, ptx, Path(folder) / "k2.cubin")
    found = dict(re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", usage))
    name = getattr(launch.kernel, "__name__", str(launch.kernel))
    params = {param.name for param in launch.kernel.params if param.is_constexpr}
    constexprs = {k: v for k, v in launch.kwargs.items() if k in params}
    return Resources(
        kernel=name,
        arch=f"sm_{number}",
        constexprs={k: _named(v) for k, v in constexprs.items()},
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=int(found["REG"]),
        spill_bytes=spills,
        shared_bytes=max(int(found["SHARED"]), int(compiled.metadata.shared)),
        instructions=_instructions(sass),
        advisories=advisories,
    )


def _named(value: Any) -> Any:
    """A constant as JSON can hold it: dtypes and functions, as epilogues are, by their names."""
    if isinstance(value, torch.dtype):
        return str(value)
    return value.__name__ if callable(value) else value


def ast_source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as Triton's compiler takes it: types, constants, and 16-divisible arguments."""
    kernel, params = launch.kernel, launch.kernel.params
    names = {param.name for param in params}
    options = {k: v for k, v in launch.kwargs.items() if k not in names}
    values = {param.name: value for param, value in zip(params, launch.args, strict=False)}
    values |= {k: v for k, v in launch.kwargs.items() if k in names}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(value: Any, path: tuple[int, ...], constant: bool, plain: bool) -> Any:
        """The type of an argument or of an entry of a tuple; constants are noted by their path."""
        if isinstance(value, tuple) and not constant:
            # do_not_specialize does not reach what a tuple holds.
            return tuple(typed(each, (*path, k), False, False) for k, each in enumerate(value))
        # Triton makes a constant of None, and of 1 unless the kernel asks it not to specialize.
        if constant or value is None or (type(value) is int and value == 1 and not plain):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int):
            if value % 16 == 0 and not plain:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if abs(value) < 2**31 else "i64"
        if len(path) > 1:
            raise TypeError(f"argument {path}: Triton's launcher unpacks no descriptor in a tuple")
        shape = ",".join(str(size) for size in value.block_shape)  # a tensor descriptor
        element = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{element}[{shape}]>"

    for index, param in enumerate(params):
        signature[param.name] = typed(
            values.get(param.name, param.default), (index,), param.is_constexpr,
            param.do_not_specialize,
        )  # fmt: skip
    return ASTSource(kernel, signature, constants, attributes), options


def launch_key(launch: Launch) -> str:
    """A hash of what one launch compiles, but for the kernel's source (`sources_key`)."""
    source, options = ast_source(launch)
    constants = sorted((path, str(_named(value))) for path, value in source.constants.items())
    parts = (launch.kernel.__name__, source.signature, constants, source.attrs, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def sources_key() -> str:
    """A hash of the source of every function in this package that Triton compiles."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.startswith("pixart_rt.kernels."):
            for attribute, value in vars(module).items():
                if isinstance(value, triton.JITFunction) and value.fn.__module__ == name:
                    found[f"{name}.{attribute}"] = inspect.getsource(value.fn)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _assembler(bin_dir: Path, ptx: Path, out: Path) -> tuple[int, tuple[str, ...]]:
    """Bytes spilled, and the codes of the advisories: C7510 and its like are slow code."""
    target = re.search(r"\.target\s+sm_(\d+\w*)", ptx.read_text(encoding="utf-8"))
    assert target is not None
    number = int(re.sub(r"\D", "", target[1]))
    assembler = bin_dir / ("ptxas-blackwell" if number >= 100 else "ptxas")
    done = subprocess.run(
        [assembler, "-v", "-arch", f"sm_{target[1]}", ptx, "-o", out],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return spilled, tuple(sorted(set(re.findall(r"\bC7\d{3}\b", said))))


def _run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def _instructions(sass: str) -> Counter[str]:
    """Mnemonics without their modifiers, and LDG.128 for 16-byte global loads."""
    counts: Counter[str] = Counter()
    for full in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass):
        counts[full.partition(".")[0]] += 1
        if full.startswith("WARPGROUP."):  # ARRIVE begins and DEPBAR ends a group of HGMMA
            counts[".".join(full.split(".")[:2])] += 1
        if full.startswith("LDG") and ".128" in full:
            counts["LDG.128"] += 1
    return counts
