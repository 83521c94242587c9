"""The benchmark of a training step: it runs without a GPU, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORDS = ("--model", "tiny", "--res", "64", "--batch", "3", "--steps", "1")


@pytest.fixture
def bench(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("train_step")


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[int, Any]:
    monkeypatch.setattr(sys, "argv", ["train_step.py", *WORDS, "--json", str(out), *words])
    return bench.main(), json.loads(out.read_text())


def test_every_form_agrees_with_the_peer_and_is_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    """All but those that compile, which take a minute (the test after this)."""
    forms = [form.name for form in bench.FORMS if not form.compiled]
    code, found = run(bench, monkeypatch, tmp_path / "x.json", "--forms", ",".join(forms))
    assert code == 0 and found["commit"] and found["versions"]["torch"]
    assert found["measured"] is False, "no GPU: the file must say so"
    assert [row["form"] for row in found["rows"]] == ["diffusers", "ours"]
    assert [row["form"] for row in found["not_run"]] == ["ours fused"]
    for row in found["rows"]:
        assert row["agrees"] and row["difference"] <= 1e-5 and row["seconds"] > 0
        assert row["mfu"] is None and row["model_flops"] > 0
    (pair,) = found["compared"]
    assert (pair["peer"], pair["ours"]) == ("diffusers", "ours")
    peer, ours = (row["seconds"] for row in found["rows"])
    assert pair["speedup"] == pytest.approx(peer / ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of PyTorch, compiling the peer
def test_compiled_forms_agree_too(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    forms = "diffusers compiled,ours compiled selective"
    code, found = run(bench, monkeypatch, tmp_path / "x.json", "--forms", forms)
    assert code == 0 and len(found["rows"]) == 2
    assert all(row["agrees"] and row["seconds"] > 0 for row in found["rows"])


@pytest.mark.parametrize("wrong", ["loss", "captions", "positions"])
def test_a_form_that_differs_is_given_no_speed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None, wrong: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The peer is another in one thing: 3 % of its loss, captions never dropped, positions."""
    loss, config = bench.Peer.loss, importlib.import_module("benchmarks.weights").config_to_json
    name, changed = {
        "loss": ("train_step.Peer.loss", lambda *given: 1.03 * loss(*given)),
        "captions": ("train_step.drop_captions", lambda embeds, mask, *_: (embeds, mask)),
        "positions": (
            "weights.config_to_json", lambda given: config(given) | {"interpolation_scale": 2}
        ),
    }[wrong]  # fmt: skip
    monkeypatch.setattr(f"benchmarks.{name}", changed)
    monkeypatch.setattr(bench, "DROPOUT", 1.0)
    code, found = run(bench, monkeypatch, tmp_path / "x.json", "--forms", "ours")
    (row,) = found["rows"]
    assert code == 1 and not row["agrees"] and row["difference"] > 10 * bench.TOLERANCE
    assert "seconds" not in row and found["compared"] == []
    printed = capsys.readouterr().out
    assert "not timed" in printed and "images/s" not in printed


@pytest.mark.parametrize("wrong", [None, "bfloat16", "float32"])
def test_gradients_of_the_timed_precision_are_compared(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None,
    wrong: str | None,
) -> None:  # fmt: skip
    """One gradient is off by a fifth in one precision, as of a backward that is wrong there."""
    checked = bench.Ours.checked

    def broken(self: Any, batch: Any, precision: Any) -> Any:
        loss, gradients = checked(self, batch, precision)
        name = "blocks.1.attn.qkv.weight"
        if wrong == {"bf16": "bfloat16", "fp32": "float32"}[str(precision)]:
            gradients[name] = 1.2 * gradients[name]
        return loss, gradients

    monkeypatch.setattr(bench.Ours, "checked", broken)
    words = ("--forms", "diffusers,ours", "--precision", "bf16")
    code, found = run(bench, monkeypatch, tmp_path / "x.json", *words)
    peer, row = found["rows"]
    assert peer["agrees"] and 1e-3 < peer["half_difference"] < 0.5, "bfloat16 rounds"
    if wrong is None:
        assert code == 0 and row["agrees"] and row["seconds"] > 0
        assert row["half_difference"] <= row["half_allowed"]
        return
    assert code == 1 and not row["agrees"] and "seconds" not in row
    if wrong == "bfloat16":
        assert row["difference"] <= 1e-5 and row["half_most_different"].endswith("qkv.weight")
        assert row["half_difference"] > 0.15
    else:
        assert row["most_different"].endswith("qkv.weight") and "half_difference" not in row


def test_unknown_forms_are_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(bench, monkeypatch, tmp_path / "x.json", "--forms", "theirs")
    assert stopped.value.code == 2 and not (tmp_path / "x.json").exists()
