"""Every kernel and shipped configuration compiles for GPUs that are not here, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("attention", "cross_attention", "linear", "fp8_linear")  # files with matrix products
ELEMENTWISE = {"ln_modulate", "gate_residual", "solver", "group_norm_silu"}
PRODUCTS = {
    "_attention_kernel", "_attention_backward_kv_kernel", "_attention_backward_q_kernel",
    "_absorbed_scores_kernel", "_linear_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the assembler said of every kernel; a process of its own, for it must not interpret."""
    out = tmp_path_factory.mktemp("codegen") / "codegen.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", "--json", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())["kernels"]


def test_every_file_is_compiled_for_every_gpu(rows):
    for arch in ("sm_80", "sm_90", "sm_120"):
        files = {row["file"] for row in rows if row["arch"] == arch}
        missing = {"fp8_linear"} if arch == "sm_80" else set()
        assert files == ELEMENTWISE | set(MATRIX) - missing
    assert {row["file"] for row in rows if row["arch"] == "sm_70"} == ELEMENTWISE


def test_nothing_spills(rows):
    bad = [(row["kernel"], row["arch"], row["dtype"], row["spill_bytes"]) for row in rows
           if row["spill_bytes"] or row["local_memory"]]  # fmt: skip
    assert not bad


def test_everything_fits_in_shared_memory(rows):
    limit = {"sm_70": 98304, "sm_80": 166912, "sm_90": 232448, "sm_120": 101376}
    assert all(row["shared_bytes"] <= limit[row["arch"]] for row in rows)


def products(rows, arch):
    """The kernels of an architecture whose work is matrix products."""
    found = [row for row in rows if row["arch"] == arch and row["kernel"] in PRODUCTS
             and row["dtype"] != "float32"]  # fmt: skip
    assert {row["kernel"] for row in found} == PRODUCTS
    return found


def test_tensor_cores_are_used(rows):
    for row in products(rows, "sm_80"):
        assert row["instructions"].get("HMMA", 0) > 0, row["kernel"]
        assert row["instructions"].get("LDGSTS", 0) > 0, row["kernel"]
    for row in products(rows, "sm_90"):
        names = row["instructions"]
        assert names.get("HGMMA", 0) + names.get("QGMMA", 0) > 0, row["kernel"]
        assert names.get("UTMALDG", 0) > 0, row["kernel"]
    for row in products(rows, "sm_120"):
        assert row["tensor_core"] > 0, row["kernel"]
