"""`bench`: what it refuses, and one measurement from the command to its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt.bench.plots import KINDS
from pixart_rt.bench.stages import STAGES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,x"], "--batch '1,x'"),
        (["--batch", "0"], "batches"),
        (["--peer", "onediff"], "diffusers-compile"),
        (["--steps", 0], "between 1 and"),
        (["--backend", "torch"], "built already"),
        (["--model", "tiny"], "built already"),
        (["--res", 256], "bundle for 1024 px"),
        (["--repeats", 0], "repeats"),
    ],
)
def test_impossible_settings_are_refused_before_loading(
    run: Callable[..., Any], hollow_bundle: Path, options: list[object], message: str
) -> None:
    outcome = run("bench", hollow_bundle, *options)
    assert outcome.code == 2
    assert message in outcome.error


def test_a_folder_that_is_no_bundle(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("bench", tmp_path)
    assert outcome.code == 1
    assert "is not a bundle" in outcome.error


def test_without_matplotlib_nothing_is_measured(
    run: Callable[..., Any], hollow_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "pixart_rt.bench.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = ("bench", hollow_bundle, "--json", hollow_bundle.parent / "out.json")
    outcome = run(*asked)
    assert outcome.code == 1
    assert "pip install 'pixart_rt[train]'" in outcome.error
    assert "no text encoder" in run(*asked, "--no-plots").error, "now it continues, to the bundle"


def test_a_measurement_beside_diffusers(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "new" / "bench.json"
    outcome = run("bench", bundle_256, "--steps", 2, "--repeats", 2, "--batch", "1,2", "--peer",
                  "diffusers", "--json", out)  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads(out.read_text())
    assert {path.name for path in out.parent.iterdir()} == {
        "bench.json", *(f"bench-{kind}.png" for kind in KINDS)
    }  # fmt: skip
    for name in ("pixart_rt", "diffusers"):
        assert name in outcome.out
        cold = result["systems"][name]["cold"]
        assert cold["total_s"] > 0 and cold["peak_memory"]["process"] > 0
    assert "…" not in outcome.out, "80 columns are enough"
    assert result["speedup"]["diffusers"]["paired"] > 0
    assert result["agreement"]["diffusers"]["agrees"] is True


def test_images_that_differ_fail_and_are_still_reported(
    run: Callable[..., Any], bundle_256: Path
) -> None:
    outcome = run("bench", bundle_256, "--steps", 2, "--repeats", 1, "--peer", "diffusers",
                  "--no-cold", "--json", "-", "--min-psnr", 1000)  # fmt: skip
    result = json.loads(outcome.out)
    agreement = result["agreement"]["diffusers"]
    if agreement["psnr_db"] is None:
        pytest.skip("these images are equal in every pixel")
    assert outcome.code == 1
    assert "worth nothing" in outcome.error
    assert agreement["agrees"] is False and agreement["bound_psnr_db"] == 1000


def check_counts(result: dict[str, Any], steps: int, repeats: int) -> None:
    """Every series has its repetitions, calls and stages, and every peer's images are ours."""
    for name, system in result["systems"].items():
        for series in system["series"]:
            assert len(series["latency_s"]) == repeats
            assert series["transformer_calls"] == steps
            whole = sum(series["stages_mean_s"][stage] for stage in STAGES)
            assert whole == pytest.approx(series["mean_s"])
        if name != "pixart_rt":
            assert result["agreement"][name]["agrees"] is True


def test_the_tiny_model_is_built_and_compared(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that docs/performance.md is made by, at 256 px. No speed."""
    monkeypatch.chdir(tmp_path)
    outcome = run("bench", "--model", "tiny", "--res", 256, "--backend", "torch", "--steps", 2,
                  "--repeats", 1, "--peer", "diffusers", "--no-cold", "--no-plots", "--json",
                  "out.json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("out.json").read_text())
    assert result["request"]["model"] == "tiny" and result["request"]["num_tokens"] == 256
    check_counts(result, steps=2, repeats=1)
    assert [path.name for path in Path("engines").iterdir()] == ["bench-tiny-256-torch-fp32-1"]


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
def test_both_peers_side_by_side(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:  # fmt: skip
    """`eager` runs the whole graphs that torch.compile captures; Inductor's C++ takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    out = tmp_path / "out.json"
    outcome = run("bench", bundle_256, "--steps", 3, "--repeats", 2, "--peer", "diffusers",
                  "--peer", "diffusers-compile", "--no-cold", "--no-plots", "--json",
                  out)  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads(out.read_text())
    assert list(result["systems"]) == ["pixart_rt", "diffusers", "diffusers-compile"]
    check_counts(result, steps=3, repeats=2)
    assert result["systems"]["diffusers-compile"]["compiled"] == ["transformer", "vae_decoder"]
