"""Compile recorded launches for GPUs that are not there, and read what the compiler made of them.

Triton carries NVIDIA's assembler and disassembler, so registers, spills, shared memory and the
instructions of a kernel are known without a GPU. They say nothing about speed.
"""

from __future__ import annotations

import re
import subprocess
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

    def count(self, kind: str) -> int:
        """How many instructions of a kind of MNEMONICS."""
        return sum(self.instructions.get(name, 0) for name in MNEMONICS[kind])

    def to_dict(self) -> dict[str, Any]:
        kept = {name for names in MNEMONICS.values() for name in names} | {"LDG.128", "MUFU"}
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
        ptx.write_text(compiled.asm["ptx"])
        spills = _spills(bin_dir, ptx, Path(folder) / "k2.cubin")
    found = dict(re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", usage))
    name = getattr(launch.kernel, "__name__", str(launch.kernel))
    params = {param.name for param in launch.kernel.params if param.is_constexpr}
    constexprs = {k: v for k, v in launch.kwargs.items() if k in params}
    return Resources(
        kernel=name,
        arch=f"sm_{number}",
        constexprs={k: str(v) if isinstance(v, torch.dtype) else v for k, v in constexprs.items()},
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=int(found["REG"]),
        spill_bytes=spills,
        shared_bytes=max(int(found["SHARED"]), int(compiled.metadata.shared)),
        instructions=_instructions(sass),
    )


def ast_source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as Triton's compiler takes it: types, constants, and 16-divisible arguments."""
    kernel, params = launch.kernel, launch.kernel.params
    names = {param.name for param in params}
    options = {k: v for k, v in launch.kwargs.items() if k not in names}
    values = {param.name: value for param, value in zip(params, launch.args, strict=False)}
    values |= {k: v for k, v in launch.kwargs.items() if k in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(params):
        value = values.get(param.name, param.default)
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, Tensor):
            signature[param.name] = _POINTERS[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:  # a tensor descriptor
            shape = ",".join(str(size) for size in value.block_shape)
            element = _POINTERS[value.base.dtype].removeprefix("*")
            signature[param.name] = f"tensordesc<{element}[{shape}]>"
    return ASTSource(kernel, signature, constants, attributes), options


def _spills(bin_dir: Path, ptx: Path, out: Path) -> int:
    target = re.search(r"\.target\s+sm_(\d+\w*)", ptx.read_text())
    assert target is not None
    number = int(re.sub(r"\D", "", target[1]))
    assembler = bin_dir / ("ptxas-blackwell" if number >= 100 else "ptxas")
    done = subprocess.run(
        [assembler, "-v", "-arch", f"sm_{target[1]}", ptx, "-o", out],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stdout + done.stderr))


def _run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def _instructions(sass: str) -> Counter[str]:
    """Mnemonics without their modifiers, and LDG.128 for 16-byte global loads."""
    counts: Counter[str] = Counter()
    for full in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass):
        counts[full.partition(".")[0]] += 1
        if full.startswith("LDG") and ".128" in full:
            counts["LDG.128"] += 1
    return counts
