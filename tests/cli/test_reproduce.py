"""`pixart-rt reproduce ablation` at toy size; what it computes is tested in tests/training."""

from __future__ import annotations

import json

import pytest

WORDS = ("--steps", 4, "--resolution", 64, "--layers", 1, "--batch", 2, "--captions", 1,
         "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_a_table_pictures_and_the_numbers(run, tmp_path, monkeypatch):
    from pixart_rt.training.ablation import run as run_file

    monkeypatch.setattr(run_file, "UNSEEN", 2)
    out = tmp_path / "ablation"
    outcome = run("reproduce", "ablation", "--out", out, *WORDS)
    assert outcome.code == 0, outcome.err
    paths = outcome.out.splitlines()
    assert paths[0] == str(out / "ablation.md") and len(paths) == 6
    values = json.loads((out / "ablation.json").read_text())
    assert values["command"].startswith("pixart-rt") and "hardware" in values
    assert (
        values["costs"]["adaln"]["parameters_xl"] > values["costs"]["adaln_single"]["parameters_xl"]
    )
    again = run("reproduce", "ablation", "--out", out)
    assert again.code == 0 and again.out == outcome.out


def test_a_new_folder_needs_a_length(run, tmp_path):
    outcome = run("reproduce", "ablation", "--out", tmp_path / "none", "--device", "cpu")
    assert outcome.code == 2 and "give --minutes or --steps" in outcome.err
