"""The measuring programs run without a GPU, say so, and time nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
Module = Callable[[str], ModuleType]


def run(
    module: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--json", str(out), *words])
    return module.main(), json.loads(out.read_text())


def test_forms_of_a_step_agree(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = benchmark_module("model")
    words = ("--batch", "3", "--forms", "diffusers,ours fused")
    code, found = run(model, monkeypatch, tmp_path / "m.json", *words)
    assert code == 0 and found["measured"] is False
    (row,) = found["rows"]
    assert row["form"] == "diffusers" and row["seconds"] > 0
    assert 1e-4 < row["error"] < 2e-2, "bfloat16 differs from float32, a little"
    assert [row["because"] for row in found["not_run"]] == ["no GPU"]


@pytest.mark.parametrize("wrong", ["mask", "timestep"])
def test_a_form_that_is_wrong_has_no_time(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    model = benchmark_module("model")
    before = model.Peer.__init__

    def broken(self: Any, config: Any, state: Any, inputs: dict[str, Any]) -> None:
        changed = {
            "mask": lambda: torch.ones_like(inputs["mask"]),
            "timestep": lambda: inputs["timestep"] + 300,
        }
        before(self, config, state, inputs | {wrong: changed[wrong]()})

    monkeypatch.setattr(model.Peer, "__init__", broken)
    code, found = run(model, monkeypatch, tmp_path / "m.json", "--forms", "diffusers")
    (row,) = found["rows"]
    assert code == 1 and not row["agrees"] and "seconds" not in row


def test_kernels_errors_are_against_float64(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    """On the CPU ours are the references, in half precision as eager PyTorch's."""
    kernels = benchmark_module("kernels")
    code, found = run(kernels, monkeypatch, tmp_path / "k.json")
    assert code == 0 and found["measured"] is False
    operators = {row["operator"]: row for row in found["rows"]}
    assert len(operators) == len(found["rows"]) >= 9
    for row in found["rows"]:
        assert row["against_float64"] and row["seconds"]["ours"] > 0
        assert row["errors"]["ours"] < 5e-3, row["operator"]
    assert operators["attention_qkv_packed"]["errors"]["eager"] > 1e-5, "not float64 itself"


def test_the_loop_is_timed_by_the_step(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    loop = benchmark_module("loop")
    words = ("--model", "tiny", "--res", "256", "--steps", "1", "--images", "2")
    with torch.no_grad():
        code, found = run(loop, monkeypatch, tmp_path / "l.json", *words)
    assert code == 0 and found["measured"] is False
    assert [row["prompt_tokens"] for row in found["rows"]] == list(loop.PROMPTS)
    assert all(row["agrees"] and row["graph_replays"] == 0 for row in found["rows"])


@pytest.mark.slow
def test_the_whole_script_runs_small(tmp_path: Path) -> None:
    """Limits and kernels: from the shell to the pictures."""
    ran = subprocess.run(
        [CHECKOUT / "benchmarks" / "h200.sh", tmp_path / "out", "--small", "--parts",
         "limits,kernels"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "h200.json").read_text())
    assert found["measured"] is False and "No GPU" in ran.stdout
    assert {job["state"] for job in found["jobs"]} == {"done"}
    assert all(row["met"] is None for row in found["bars"])
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"h200-attention.png", "h200-products.png", "h200-kernels.png"}


@pytest.mark.parametrize("name", ["model", "train_step"])
def test_a_form_that_fails_leaves_the_others(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str,
    no_kernels: None,
) -> None:  # fmt: skip
    """And what was measured before is on the disk when it does."""
    module = benchmark_module(name)
    before, out = module.measure, tmp_path / "x.json"

    def failing(form: Any, *given: Any) -> Any:
        if getattr(form, "name", form) == "diffusers":
            raise torch.OutOfMemoryError("out of memory\nmore")
        assert json.loads(out.read_text())["rows"][0]["failed"], "not yet saved"
        return before(form, *given)

    monkeypatch.setattr(module, "measure", failing)
    words = {
        "model": ("--forms", "diffusers,ours reference compiled"),
        "train_step": ("--forms", "diffusers,ours", "--model", "tiny", "--res", "64", "--batch",
                       "2", "--steps", "1"),
    }[name]  # fmt: skip
    if name == "model":
        monkeypatch.setattr(module, "COMPILED", ())
    code, found = run(module, monkeypatch, out, *words)
    failed, good = found["rows"]
    assert code == 1 and failed["failed"] == "OutOfMemoryError: out of memory"
    assert "seconds" not in failed and good["seconds"] > 0
