"""Launches by Triton's own path on a GPU that is not there, in a process of its own.

    python -m tests.kernels.jit_on_standin PART,... DTYPE,...   of XL/2, for test_jit_sm90.py
    python -m tests.kernels.jit_on_standin FILE.json   of tests, for test_launch_compiles.py

Prints one JSON object. What of it is real is in benchmarks/standin_driver.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.standin_driver import NoProducts, StandInDriver, resources, standing_in
from pixart_rt.config import Kernels, Quality
from pixart_rt.inference.token_loop import LoopInputs, run_loop
from pixart_rt.kernels.catalog import FILES
from pixart_rt.kernels.gate_residual import gate_residual_ln_modulate
from pixart_rt.kernels.linear import linear_gate_residual
from pixart_rt.kernels.ln_modulate import ln_modulate
from pixart_rt.model.transformer import PixArtTransformer
from tests.capture_clean import WAITS
from tests.kernels.launches import Spec, decode
from tests.xl_loop import STANDARD, denoiser, loop_inputs, xl

BLOCKS = 3  # the first sees images, then rows; the last makes no norm for a next one
RAGGED = (22, 46)  # tokens of a 512 px bucket: 1012, no multiple of 16
Work = Callable[[], None]


@dataclass
class Report:
    """What reached the driver; `ran` counts the launches of each work."""

    ran: dict[str, int] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)  # by each work
    variants: dict[str, int] = field(default_factory=dict)  # by kernel
    descriptors: int = 0
    most_shared: int = 0
    most_registers: int = 0
    spilled: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # operators that wait for the device
    errors: dict[str, str] = field(default_factory=dict)  # what a work raised


def examples(dtype: torch.dtype) -> dict[str, Work]:
    """What benchmarks.codegen compiles."""

    def work() -> None:
        for file in FILES:
            file.compile_example(dtype)

    return {f"examples {dtype}": work}


def steps(
    dtype: torch.dtype,
    quality: Quality,
    sizes: tuple[int, ...],
    numbers: tuple[int, ...],
    forms: tuple[int, ...],
) -> dict[str, Work]:
    """A step with and one without guidance of XL/2, at each size, number of images, and form."""
    found: dict[str, Work] = {}
    module = denoiser(xl(1024, BLOCKS), "cpu", dtype, quality)
    for resolution, images, form in itertools.product(sizes, numbers, forms):
        config = xl(resolution, BLOCKS)
        inputs = loop_inputs(config, images, form, "cpu", dtype, (True, False))

        def work(inputs: LoopInputs = inputs, channels: int = config.in_channels) -> None:
            with torch.no_grad():
                run_loop(module, inputs, channels)

        found[f"{quality} {dtype} {resolution} px, {images}, text {form}"] = work
    return found


def loops(dtype: torch.dtype) -> dict[str, Work]:
    """At every size, with one and two images, and every form of the text."""
    return steps(dtype, Quality.HIGH, (256, 512, 1024), (1, 2), (STANDARD, 16, 32, 64))


def fp8(dtype: torch.dtype) -> dict[str, Work]:
    return steps(dtype, Quality.FAST, (256, 512, 1024), (1, 2), (STANDARD, 32))


def fp8_once(dtype: torch.dtype) -> dict[str, Work]:
    """What is different in fp8, at one size."""
    return steps(dtype, Quality.FAST, (1024,), (1,), (STANDARD, 32))


def ragged(dtype: torch.dtype) -> dict[str, Work]:
    """The same step with a number of tokens that 16 divides, and with one that it does not."""
    config = xl(512, BLOCKS)
    module = denoiser(config, "cpu", dtype)
    found: dict[str, Work] = {}
    for grid in ((32, 32), RAGGED):
        inputs = loop_inputs(config, 2, STANDARD, "cpu", dtype, (True,), grid)

        def work(inputs=inputs) -> None:
            with torch.no_grad():
                run_loop(module, inputs, config.in_channels)

        found[f"{grid[0]} x {grid[1]} tokens"] = work
    return found


def training(dtype: torch.dtype) -> dict[str, Work]:
    """Forward and backward of XL/2 under autocast, weights in float32."""
    return {f"training under autocast to {dtype}": trained(torch.float32, dtype)}


def training_plain(dtype: torch.dtype) -> dict[str, Work]:
    """The same with everything in `dtype`."""
    return {f"training in {dtype}": trained(dtype, dtype)}


def trained(weights: torch.dtype, dtype: torch.dtype) -> Work:
    with torch.device("meta"):
        model = PixArtTransformer(xl(512, BLOCKS)).to(weights)
    model = model.to_empty(device="cpu").use(Kernels.FUSED)
    config = model.config
    inputs = (
        torch.empty(2, 1024, config.token_channels),
        torch.empty(1, 1024, config.hidden_size),
        torch.empty(2, 7, config.hidden_size),
        torch.empty(2, config.max_text_tokens, config.caption_channels),
        torch.empty(2, config.max_text_tokens, dtype=torch.bool),
    )
    autocast = weights != dtype

    def work() -> None:
        with torch.autocast("cpu", dtype, enabled=autocast):
            torch.set_autocast_enabled("cuda", autocast)  # what a GPU's tensors ask for
            torch.set_autocast_dtype("cuda", dtype)
            try:
                model(*inputs).sum().backward()
            finally:
                torch.set_autocast_enabled("cuda", False)

    return work


def rows(dtype: torch.dtype) -> dict[str, Work]:
    """Each operator that takes the number of a row of a table, at rows 0 to 4."""
    x = torch.empty(2, 256, 1152, dtype=dtype)
    table, shared = torch.empty(6, 1152, dtype=dtype), torch.empty(2, 6, 1152)
    weight, bias = torch.empty(1152, 1152, dtype=dtype), torch.empty(1152, dtype=dtype)
    operators: dict[str, Callable[[int], object]] = {
        "ln_modulate": lambda row: ln_modulate(x, table, shared, row),
        "linear_gate_residual": lambda row: linear_gate_residual(
            x, weight, bias, table, shared, row, x
        ),
        "gate_residual_ln_modulate, gate": lambda row: gate_residual_ln_modulate(
            x, x, table, shared, row, table, shared, 3
        ),
        "gate_residual_ln_modulate": lambda row: gate_residual_ln_modulate(
            x, x, table, shared, 2, table, shared, row
        ),
    }

    def work(call: Callable[[int], object]) -> Work:
        return lambda: [call(row) for row in range(5)] and None

    return {name: work(call) for name, call in operators.items()}


def refused(dtype: torch.dtype) -> dict[str, Work]:
    """Launches that a GPU refuses, by what the driver should say."""
    x = torch.empty(64, 64, dtype=dtype)
    out = torch.empty(64, dtype=dtype)
    overlapping = TensorDescriptor(x, [63, 64], [32, 1], [16, 64])
    plain = TensorDescriptor(x, [64, 64], [64, 1], [16, 64])
    return {
        "stride 64 of dimension 1": lambda: _read[1,](overlapping, out, BLOCK=64),
        "grid 1 x 70000 x 1": lambda: _read[1, 70000](plain, out, BLOCK=64),
    }


@triton.jit
def _read(source, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.sum(source.load([0, 0]), 0))


PARTS = {
    part.__name__: part
    for part in (
        refused, rows, loops, fp8, fp8_once, ragged, training, training_plain, examples,
    )
}  # fmt: skip


def written(file: Path) -> dict[str, Work]:
    """The launches of a file that tests/kernels/launches.py wrote."""

    def work(spec: Spec) -> Work:
        kernel = decode({"function": spec["kernel"]})
        args = [decode(arg) for arg in spec["args"]]
        kwargs = {name: decode(value) for name, value in spec["kwargs"].items()}
        return lambda: kernel[tuple(spec["grid"])](*args, **kwargs)

    specs = json.loads(file.read_text())
    return {f"{i} {spec['kernel'][1]}": work(spec) for i, spec in enumerate(specs)}


def run(driver: StandInDriver, works: dict[str, Work]) -> Report:
    report = Report()
    for name, work in works.items():
        launches, kernels = driver.launches, len(driver.kernels)
        try:
            with NoProducts() as operators:
                work()
        except (RuntimeError, triton.TritonError) as error:
            report.errors[name] = str(error)
        report.waits += [f"{name}: {each}" for each in operators.seen if each in WAITS]
        report.ran[name] = driver.launches - launches
        report.compiled[name] = len(driver.kernels) - kernels
    report.variants, report.descriptors = dict(driver.variants()), driver.descriptors
    for kernel in driver.kernels:
        usage = resources(kernel)
        report.most_shared = max(report.most_shared, kernel.shared_bytes)
        report.most_registers = max(report.most_registers, usage["registers"])
        if usage["local_bytes"]:
            report.spilled.append(f"{kernel.name}: {usage['local_bytes']}")
        if kernel.global_scratch:
            report.scratch.append(kernel.name)
    return report


def main() -> int:
    works: dict[str, Work] = {}
    if sys.argv[1].endswith(".json"):
        works = written(Path(sys.argv[1]))
    else:
        for name, part in itertools.product(sys.argv[2].split(","), sys.argv[1].split(",")):
            works |= PARTS[part](getattr(torch, name))
    with standing_in((9, 0)) as driver:
        report = run(driver, works)
    print(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
