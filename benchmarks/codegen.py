"""Compile every kernel for GPUs that are not there; the tables of docs/kernels.md.

    python -m benchmarks.codegen                  writes results/codegen.json and the page
    python -m benchmarks.codegen --json OUT.json  only the JSON, at OUT.json
    python -m benchmarks.codegen --keys           what would be compiled, without compiling it

Needs no GPU: Triton carries NVIDIA's assembler. Shapes are those of one 1024 px image with
guidance. Registers, spills, shared memory and instructions are facts; they are not speed. Traffic
is counted while one block of XL/2 runs on tensors without data: what every operator reads and
writes, each tensor once; operators that move less than 0.1 MB are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: compile, do not interpret

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.provenance import ROOT, write_result, write_sections
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.config import XL_2_1024_MS, Kernels
from pixart_rt.kernels import launch
from pixart_rt.kernels.catalog import FILES
from pixart_rt.kernels.codegen import compile_launch, launch_key, sources_key
from pixart_rt.kernels.cross_attention import Absorbed
from pixart_rt.model.operators import operators
from pixart_rt.model.transformer import Block, CrossText

TARGETS = {  # compute capability -> dtypes; sm_70 has no tensor cores in Triton, nor bfloat16
    (7, 0): (torch.float16,),
    (8, 0): (torch.float16, torch.bfloat16, torch.float32),
    (9, 0): (torch.float16, torch.bfloat16, torch.float32),
    (12, 0): (torch.bfloat16,),
}
ELEMENTWISE = ("ln_modulate", "gate_residual", "solver", "group_norm_silu")
FLOAT32 = (
    "ln_modulate",
    "gate_residual",
    "linear",
    "group_norm_silu",
)  # attention in float32 is PyTorch's
GUIDED = 32  # tokens of the prompt of a guided step
SHARED_LIMIT = {"sm_70": 98304, "sm_80": 166912, "sm_90": 232448, "sm_120": 101376}  # per block
DOC = ROOT / "docs" / "kernels.md"
SECTIONS = ("resources", "traffic")  # of the page: <!-- name:begin --> ... <!-- name:end -->


def compile_all() -> list[dict[str, Any]]:
    """One entry a kernel, configuration, GPU and dtype, in a fixed order.

    GPUs side by side, the ones with the most kernels first: minutes of assembling each.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        jobs = {arch: pool.submit(compile_for, arch) for arch in sorted(TARGETS, key=_first)}
        return [row for arch in TARGETS for row in jobs[arch].result()]


def _first(arch: tuple[int, int]) -> int:
    return -len(TARGETS[arch])


def compile_for(arch: tuple[int, int]) -> list[dict[str, Any]]:
    """The entries of one GPU."""
    rows = []
    for name, dtype, each in distinct_launches(arch):
        print(f"{name} {arch} {dtype} {each.kernel.__name__}", flush=True)
        rows.append(_row(name, dtype, each, arch))
    return rows


def distinct_launches(
    arch: tuple[int, int],
) -> Iterator[tuple[str, torch.dtype, launch.Launch]]:
    """File, dtype and launch of everything that is compiled for one GPU, in a fixed order."""
    done = set()
    for file in FILES:
        name = file.__name__.rpartition(".")[2]
        if arch < launch.SM80 and name not in ELEMENTWISE:
            continue
        for dtype in TARGETS[arch]:
            if dtype == torch.float32 and name not in FLOAT32:
                continue
            for each in launches(file, arch, dtype):
                key = (str(dtype), launch_key(each))
                if key not in done:
                    done.add(key)
                    yield name, dtype, each


def sample(number: int) -> list[dict[str, Any]]:
    """`number` entries, taken evenly from the fixed order."""
    everything = [(arch, *found) for arch in TARGETS for found in distinct_launches(arch)]
    chosen = everything[:: len(everything) // number][:number]
    return [_row(name, dtype, each, arch) for arch, name, dtype, each in chosen]


def present() -> dict[str, Any]:
    """The keys of what would be compiled now, without compiling it."""
    keys = [launch_key(each) for arch in TARGETS for _, _, each in distinct_launches(arch)]
    return {"triton": triton.__version__, "sources": sources_key(), "keys": keys}


def launches(file: Any, arch: tuple[int, int], dtype: torch.dtype) -> list[launch.Launch]:
    """What a file launches on a GPU for an image with guidance at 1024 px; in bfloat16 also at 256
    and 512 px, which select the other entries of the shipped table, each for its own shapes."""
    found: list[launch.Launch] = []
    for tokens in (4096, 256, 1024) if dtype == torch.bfloat16 else (4096,):
        with launch.record(arch) as recorded:
            file.compile_example(dtype, 2, tokens)
        found += recorded
    return found


def _row(
    file: str, dtype: torch.dtype, each: launch.Launch, arch: tuple[int, int]
) -> dict[str, Any]:
    found = compile_launch(each, arch)
    counts = {kind: found.count(kind) for kind in ("tensor_core", "async_copy", "local_memory")}
    dtype_name = str(dtype).removeprefix("torch.")
    named = {"file": file, "dtype": dtype_name, "key": launch_key(each)}
    return {**named, **found.to_dict(), **counts}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a kernel, GPU and configuration, its variants as ranges."""
    lines = [
        "| kernel | GPU | tiles, warps, stages | registers | spilled | shared KB | "
        "tensor-core instructions | asynchronous loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["dtype"] != ("float16" if row["arch"] == "sm_70" else "bfloat16"):
            continue
        tiles = "x".join(str(v) for k, v in row["constexprs"].items()
                         if k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS"))  # fmt: skip
        shape = f"{tiles or row['constexprs'].get('BLOCK_D', row['constexprs'].get('BLOCK'))}"
        shape += f", {row['num_warps']}, {row['num_stages']}"
        name = row["kernel"].strip("_").removesuffix("_kernel")
        kind = " fp8" if _count(row, FP8_PRODUCTS) else ""
        groups.setdefault((name + kind, row["arch"], shape), []).append(row)
    for (name, arch, shape), same in groups.items():
        lines.append(
            f"| {name} | {arch} | {shape} | {_span(same, 'registers')} | "
            f"{_span(same, 'spill_bytes')} | {_span(same, 'shared_bytes', 1024)} | "
            f"{_names(same, PRODUCTS)} | {_names(same, COPIES)} |"
        )
    return "\n".join(lines) + "\n"


FP8_PRODUCTS = ("QGMMA", "QMMA")
PRODUCTS = ("HMMA", "HGMMA", *FP8_PRODUCTS)
COPIES = ("LDGSTS", "UTMALDG")


def _count(row: dict[str, Any], names: tuple[str, ...]) -> int:
    return sum(row["instructions"].get(name, 0) for name in names)


def _span(rows: list[dict[str, Any]], key: str, unit: int = 1) -> str:
    values = [round(row[key] / unit) for row in rows]
    return f"{min(values)} to {max(values)}" if min(values) < max(values) else str(values[0])


def _names(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    found = [name for name in names if any(row["instructions"].get(name) for row in rows)]
    spans = [f"{_span([row['instructions'] | {name: _count(row, (name,))} for row in rows], name)} "
             f"{name}" for name in found]  # fmt: skip
    return ", ".join(spans) or "-"


class Traffic(TorchDispatchMode):
    """Bytes that every operator reads and writes; views and what returns its input cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {_place(t): t for t in tree_leaves((args, kwargs)) if _is(t)}
        made = {_place(t): t for t in tree_leaves(output) if _is(t)}
        known = {storage for storage, _ in given}
        new = [t for (storage, _), t in made.items() if storage not in known]
        new += [  # written where it is
            arg for arg, declared in zip(args, func._schema.arguments, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
        ]  # fmt: skip
        if new:
            self.rows.append({
                "operator": str(func).removeprefix("aten.").removesuffix(".default"),
                "read": sum(map(_bytes, given.values())),
                "written": sum(map(_bytes, new)),
            })  # fmt: skip
        return output


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def block_traffic(kernels: Kernels, absorbed: int = 0) -> list[dict[str, Any]]:
    """One block of XL/2 forward in bfloat16: B = 2, N = 4096, 120 text tokens.

    With `absorbed` the block of a guided step: the first row's prompt is empty, the other's has at
    most so many tokens (kernels/cross_attention.py).
    """
    config = XL_2_1024_MS
    D = config.hidden_size
    with FakeTensorMode(), mock.patch.object(launch, "interpreting", lambda: True):
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be converted
        block = Block(config)
        torch.set_default_dtype(torch.float32)
        x, y = torch.empty(2, 2, 4096, D, dtype=torch.bfloat16).unbind()
        shared = torch.empty(2, 6, D)
        kv = torch.empty(2, 120, 2, config.num_heads, config.head_dim, dtype=torch.bfloat16)
        text = CrossText(kv, torch.empty(2, 120, dtype=torch.bool))
        if absorbed:
            keys, values, constant = (
                torch.empty(1, rows, D, dtype=torch.bfloat16)
                for rows in (config.num_heads * absorbed, config.num_heads * absorbed, 1)
            )
            bias = torch.empty(1, config.num_heads, absorbed)
            text = CrossText(Absorbed(keys, bias, values), text.mask[1:], constant)
        following = block.scale_shift_table.detach().clone()
        with torch.no_grad(), Traffic() as traffic:
            block(operators(kernels), x, y, shared, text, following)
    return [row for row in traffic.rows if row["read"] + row["written"] > 1e5]


def traffic_table(traffic: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: both lists of operators in the order they run, and their sums."""
    text = ""
    for name, rows in traffic.items():
        total = sum(row["read"] + row["written"] for row in rows) / 1e6
        text += f"\n{name}: {len(rows)} operators, {total:.0f} MB.\n\n"
        text += "| operator | reads MB | writes MB |\n|---|---|---|\n"
        for row in rows:
            text += (
                f"| `{row['operator']}` | {row['read'] / 1e6:.1f} | {row['written'] / 1e6:.1f} |\n"
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write only this file")
    parser.add_argument("--sample", type=int, help="print this many entries as JSON, no more")
    parser.add_argument("--keys", action="store_true", help="print what would be compiled, no more")
    args = parser.parse_args()
    if args.keys or args.sample:
        print(json.dumps(present() if args.keys else sample(args.sample)))
        return 0
    chosen = args.json
    rows = compile_all()
    traffic = {kernels.value: block_traffic(kernels) for kernels in Kernels}
    traffic["fused, guided, empty negative prompt"] = block_traffic(Kernels.FUSED, GUIDED)
    values = {
        "shared_limit": SHARED_LIMIT,
        "sources": sources_key(),
        "kernels": rows,
        "traffic": traffic,
    }
    if chosen is not None:
        ResultFile(chosen)(values)
        return 0
    path = write_result("codegen", values)
    write_sections(DOC, dict(zip(SECTIONS, (table(rows), traffic_table(traffic)), strict=True)))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
