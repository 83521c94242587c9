"""Every launch of XL/2 by the path that a card takes, for sm_90, with a driver that runs nothing.

benchmarks/standin_driver.py says what is real: specialization, compilation, Triton's C launcher and
what a GPU refuses. jit_on_standin.py makes the launches, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = 232448  # bytes a block may have on sm_90
SIZES, IMAGES, FORMS = (256, 512, 1024), (1, 2), (0, 16, 32, 64)
OPERATORS_WITH_ROWS = {  # parts of `rows` in jit_on_standin.py, each launched at five rows
    "ln_modulate", "linear_gate_residual", "gate_residual_ln_modulate, gate",
    "gate_residual_ln_modulate",
}  # fmt: skip
# Triton 3.6 spills 8 bytes of one kernel (see test_codegen.py); later ones none.
BEFORE_37 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
SPILLED = {"_ln_modulate_backward_kernel: 8"} if BEFORE_37 else set()
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not COMPILER,
    reason="for machines without a GPU, whose driver would be in the way, and with a C compiler",
)
pytestmark = without_gpu
Report = dict[str, Any]


def on_standin(*arguments: str) -> Report:
    """What jit_on_standin.py reports."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.jit_on_standin", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def check(report: Report, refused: set[str] = frozenset()) -> None:
    """Everything was launched, fits the GPU, and asks for nothing that is not there."""
    assert set(report["errors"]) == refused
    assert all(count > 0 for name, count in report["ran"].items() if name not in refused)
    assert 0 < report["most_shared"] <= SHARED_LIMIT
    assert set(report["spilled"]) <= SPILLED
    assert not report["scratch"]  # would need triton.set_allocator
    assert not report["waits"]


@pytest.fixture(scope="module")
def bfloat16() -> Report:
    return on_standin("refused,rows,loops,fp8_once,training", "bfloat16")


REFUSED = {"stride 64 of dimension 1", "grid 1 x 70000 x 1"}


def test_the_driver_refuses_what_a_gpu_refuses(bfloat16) -> None:
    for reason in REFUSED:
        assert reason in bfloat16["errors"][reason]


def test_a_step_of_xl_launches_at_every_size(bfloat16) -> None:
    check(bfloat16, REFUSED)
    for size in SIZES:
        for images in IMAGES:
            for form in FORMS:
                assert f"high torch.bfloat16 {size} px, {images}, text {form}" in bfloat16["ran"]
    assert "fast torch.bfloat16 1024 px, 1, text 0" in bfloat16["ran"]
    assert "training under autocast to torch.bfloat16" in bfloat16["ran"]
    assert bfloat16["descriptors"] > sum(bfloat16["ran"].values())  # tiles come by TMA


def test_no_row_of_a_table_is_a_variant_of_its_own(bfloat16) -> None:
    compiled = {name: bfloat16["compiled"][name] for name in OPERATORS_WITH_ROWS}
    assert max(compiled.values()) <= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_launches(dtype: str) -> None:
    """The other dtype, fp8 at every size, and what benchmarks.codegen compiles."""
    check(on_standin("rows,loops,fp8,ragged,training,training_plain,examples", dtype))
