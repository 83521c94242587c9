"""Every kernel and shipped configuration compiles for GPUs that are not here, without spills.

Compiling all takes minutes, so the committed results are read where they are of these very kernels,
launches and Triton; a sample is compiled again in every run, and everything by `make test-all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "codegen.json"
SAMPLE = 12  # seconds each
MATRIX = ("attention", "cross_attention", "linear", "fp8_linear")  # files with matrix products
ELEMENTWISE = {"ln_modulate", "gate_residual", "solver", "group_norm_silu"}
PRODUCTS = {
    "_attention_kernel", "_attention_backward_kv_kernel", "_attention_backward_q_kernel",
    "_absorbed_scores_kernel", "_linear_kernel",
}  # fmt: skip
# Of sm_90's matrix instructions, how many may begin a group of their own: all do where the
# assembler serializes them. Attention's products are 1 to 5 instructions long, and every group
# of them that nothing depends on in between is one.
GROUPS_PER_PRODUCT = 0.35


def run(*command: str) -> str:
    """A process of its own, for Triton must not interpret in it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def present() -> dict:
    """What would be compiled now."""
    return json.loads(run("-m", "benchmarks.codegen", "--keys").splitlines()[-1])


def is_of(stored: dict, present: dict) -> bool:
    """Whether committed results are of these kernels and launches."""
    keys = [row["key"] for row in stored["kernels"]]
    return stored["sources"] == present["sources"] and keys == present["keys"]


def compiled(out: Path) -> list[dict]:
    run("-m", "benchmarks.codegen", "--json", str(out))
    return json.loads(out.read_text())["kernels"]


@pytest.fixture(scope="module")
def rows(present: dict, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the assembler said of every kernel."""
    stored = json.loads(RESULTS.read_text())
    if stored["versions"]["triton"] == present["triton"]:
        assert is_of(stored, present), "the kernels changed: run `python -m benchmarks.codegen`"
        return stored["kernels"]
    return compiled(tmp_path_factory.mktemp("codegen") / "codegen.json")  # another Triton


def test_a_sample_compiles_to_the_same(rows, present):
    again = json.loads(run("-m", "benchmarks.codegen", "--sample", str(SAMPLE)).splitlines()[-1])
    assert again == rows[:: len(rows) // SAMPLE][:SAMPLE]


@pytest.mark.exhaustive
def test_everything_compiles_to_the_same(rows, tmp_path):
    assert compiled(tmp_path / "codegen.json") == rows


def test_results_of_other_kernels_are_noticed(present):
    stored = {"sources": present["sources"], "kernels": [{"key": k} for k in present["keys"]]}
    assert is_of(stored, present)
    assert not is_of({**stored, "sources": "another"}, present)
    assert not is_of({**stored, "kernels": stored["kernels"][1:]}, present)
    assert len(present["keys"]) > 500


def test_every_file_is_compiled_for_every_gpu(rows):
    for arch in ("sm_80", "sm_90", "sm_120"):
        files = {row["file"] for row in rows if row["arch"] == arch}
        missing = {"fp8_linear"} if arch == "sm_80" else set()
        assert files == ELEMENTWISE | set(MATRIX) - missing
    assert {row["file"] for row in rows if row["arch"] == "sm_70"} == ELEMENTWISE


def named(row: dict) -> tuple:
    return row["kernel"], row["arch"], row["dtype"], row["num_warps"], row["constexprs"]


# What Triton 3.6, the lowest supported, keeps in local memory: bytes spilled at most, and whether
# it uses local memory without a spill, by (kernel, architecture).
KNOWN_36 = {
    ("_ln_modulate_backward_kernel", "sm_90"): (8, False),
    ("_linear_kernel", "sm_120"): (44, True),
    ("_attention_kernel", "sm_120"): (0, True),
    ("_attention_backward_q_kernel", "sm_120"): (0, True),
    ("_attention_backward_kv_kernel", "sm_120"): (32, True),
    ("_absorbed_scores_kernel", "sm_120"): (0, True),
}


def test_nothing_spills(rows, present):
    """But for what Triton 3.6 makes of some kernels."""
    known = KNOWN_36 if before_37(present) else {}
    bad = []
    for row in rows:
        spilled, addressed = known.get((row["kernel"], row["arch"]), (0, False))
        local = row["local_memory"] and not row["spill_bytes"]
        if row["spill_bytes"] > spilled or (local and not addressed):
            bad.append((*named(row), row["spill_bytes"]))
    assert not bad


def before_37(present: dict) -> bool:
    major, minor, *_ = present["triton"].split(".")
    return (int(major), int(minor)) < (3, 7)


def test_the_assembler_has_nothing_to_say(rows):
    """C7510, C7515 and their like: correct code that runs its matrix products one by one."""
    bad = [(*named(row), row["advisories"]) for row in rows if row["advisories"]]
    assert not bad


def test_matrix_instructions_of_sm_90_stay_in_flight_together(rows):
    checked = set()
    for row in rows:
        names = row["instructions"]
        products = names.get("HGMMA", 0) + names.get("QGMMA", 0)
        if products:
            checked.add(row["kernel"])
            groups = names.get("WARPGROUP.ARRIVE", 0)
            assert 0 < groups <= GROUPS_PER_PRODUCT * products, (named(row), groups, products)
    assert checked == PRODUCTS


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


VARIANTS = """
import torch
from pixart_rt.kernels import attention, cross_attention, launch
from pixart_rt.kernels.codegen import ast_source
for file in (attention, cross_attention):
    for N in (41, 48, 1012, 4096):
        with launch.record((9, 0)) as recorded, launch.forcing("attention", {}):
            file.compile_example(torch.bfloat16, 2, N)
        for each in recorded:
            source, options = ast_source(each)
            print(source.fn.__name__, source.signature, source.constants, source.attrs, options)
"""


def test_attention_is_not_compiled_again_for_another_number_of_tokens():
    """By what Triton specializes a launch: integers that are 1 or multiples of 16, and types."""
    variants = run("-c", VARIANTS).splitlines()
    assert len(variants) == 4 * (4 + 7)  # numbers of tokens, launches of each file
    counts = Counter(line.partition(" ")[0] for line in set(variants))
    assert counts == {
        "_attention_kernel": 2,  # masked or not
        "_absorbed_scores_kernel": 3,  # lengths
        "_delta_kernel": 1,
        # In training: masked or not, a multiple of 16 or not.
        "_attention_backward_kv_kernel": 4,
        "_attention_backward_q_kernel": 4,
    }
