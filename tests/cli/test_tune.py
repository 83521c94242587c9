"""`pixart-rt tune` where it cannot measure, and where it can."""

from __future__ import annotations

import json

import pytest
import torch

from pixart_rt.bundle import Measurement
from pixart_rt.export import plugin_choice
from pixart_rt.kernels import catalog, tuning


def test_without_a_gpu_it_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("tune", "--out", tmp_path / "t.json")
    assert outcome.code == 1
    assert "no CUDA GPU" in outcome.error
    assert not list(tmp_path.iterdir())


def test_float32_is_refused(run):
    outcome = run("tune", "--precision", "fp32")
    assert outcome.code == 2
    assert "fp16 and bf16" in outcome.error


def test_a_second_precision_keeps_the_first(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    tested = []
    monkeypatch.setattr(
        catalog, "self_test",
        lambda device, dtype, names, *, training: tested.append((dtype, training)),
    )  # fmt: skip

    def measure(device, dtype, report, seconds, workers):
        assert workers >= 1
        name = str(dtype).removeprefix("torch.")
        left = ["op 2x1024"] if seconds < 100 else []
        return {
            "gpu": "x", "operators": {"op": {name: {"512": {"ROWS": 2}}}}, "choices": {},
            "not_tried": left,
        }  # fmt: skip

    monkeypatch.setattr(tuning, "tune", measure)
    path = tmp_path / "t.json"
    for precision in ("bf16", "fp16"):
        outcome = run("tune", "--precision", precision, "--out", path)
        assert outcome.code == 0
        assert outcome.out.strip() == str(path)
    assert json.loads(path.read_text())["operators"]["op"].keys() == {"bfloat16", "float16"}
    assert tested == [(torch.bfloat16, True), (torch.float16, True)]
    outcome = run("tune", "--minutes", "1.5", "--out", path)
    assert "1 shapes were not tried in 1.5 minutes" in outcome.err


@pytest.mark.gpu
def test_on_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TOKENS", (256,))
    monkeypatch.setattr(tuning, "BATCHES", (2,))
    outcome = run("tune", "--out", tmp_path / "t.json")
    assert outcome.code == 0
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["operators"].keys() == {subject.op for subject in tuning.SUBJECTS}


def test_a_bundle_s_plugins_are_measured_and_the_choice_is_said(run, monkeypatch, tmp_path):
    found = {
        "transformer": Measurement(
            plain=12.5, plugins=10.25, right=True, difference="", shapes={}, date=""
        ),
        "another": Measurement(
            plain=12.5, plugins=10.25, right=False, difference="rms error 1", shapes={}, date=""
        ),
    }
    monkeypatch.setattr(plugin_choice, "choose_in_bundle", lambda bundle: found)
    outcome = run("tune", "--bundle", tmp_path)
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path))
    words = " ".join(outcome.err.split())
    assert "transformer: 12.5 ms without plugins, 10.25 ms with; it will run with plugins" in words
    assert "wrong with plugins (rms error 1); it will run without plugins" in words


def test_a_bundle_without_plugins_is_refused(run, bundle_256):
    outcome = run("tune", "--bundle", bundle_256)
    assert outcome.code == 1
    assert "build it with --plugins" in outcome.error


def test_a_bundle_s_result_has_no_other_place(run, tmp_path):
    outcome = run("tune", "--bundle", tmp_path, "--out", tmp_path / "t.json")
    assert outcome.code == 2
    assert "goes into the bundle" in outcome.error
