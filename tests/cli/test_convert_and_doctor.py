"""`convert` there and back, bit for bit; `doctor` against the libraries' own versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from pixart_rt.backends import BACKENDS


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_convert_there_and_back_keeps_every_tensor(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = pipeline_folder(32) / "transformer"
    pth, back = tmp_path / "t.pth", tmp_path / "back"
    there = run("convert", source, pth)
    assert (there.code, there.out) == (0, f"{pth}\n")
    assert "y_embedding" in there.err, "what the source lacks is said"
    again = run("convert", pth, back, "--sample-size", 32, "--json")
    assert again.code == 0
    assert json.loads(again.out)["config"]["sample_size"] == 32
    expected, actual = weights(source), weights(back)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_convert_refuses_to_overwrite(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], tmp_path: Path
) -> None:
    target = tmp_path / "t.pth"
    target.write_bytes(b"mine")
    outcome = run("convert", pipeline_folder(32), target)
    assert outcome.code == 2
    assert "--force" in outcome.error
    assert target.read_bytes() == b"mine"


def test_convert_names_a_missing_source(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("convert", tmp_path / "absent.pth", tmp_path / "d")
    assert outcome.code == 1
    assert "absent.pth does not exist" in outcome.error


def test_doctor_reports_every_backend_and_library(run: Callable[..., Any]) -> None:
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert [backend["name"] for backend in found["backends"]] == list(BACKENDS)
    assert found["libraries"]["torch"] == torch.__version__
    for backend in found["backends"]:
        assert backend["ok"] or backend["fix"], "what does not work comes with its fix"


def test_doctor_as_a_table(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    outcome = run("doctor")
    assert outcome.code == 0
    for fact in (*BACKENDS, torch.__version__, onnxruntime.__version__):
        assert fact in outcome.out


def test_doctors_fixes_are_whole_lines_at_80_columns(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = json.loads(run("doctor", "--json").out)
    lines = run("doctor").out.splitlines()
    for backend in report["backends"]:
        assert any(f"│ {backend['name']} " in line for line in lines), "no name is cut"
        if not backend["ok"]:
            assert f"  {backend['name']}: {backend['fix']}" in lines
