"""`python -m examples.ablation` at toy size; what it computes is tested in test_run.py."""

from __future__ import annotations

import json

import pytest

from examples.ablation import run as run_file
from examples.ablation.__main__ import main
from pixart_rt.errors import ConfigError

WORDS = ("--steps", "4", "--resolution", "64", "--layers", "1", "--batch", "2", "--captions", "1",
         "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_a_table_pictures_and_the_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_file, "UNSEEN", 2)
    out = tmp_path / "ablation"
    main(["--out", str(out), *WORDS])
    printed = capsys.readouterr().out
    paths = printed.splitlines()
    assert paths[0] == str(out / "ablation.md") and len(paths) == 6
    values = json.loads((out / "ablation.json").read_text())
    assert values["command"].startswith("python -m examples.ablation --out")
    assert "hardware" in values
    assert (
        values["costs"]["adaln"]["parameters_xl"] > values["costs"]["adaln_single"]["parameters_xl"]
    )
    main(["--out", str(out)])
    assert capsys.readouterr().out == printed


def test_a_new_folder_needs_a_length(tmp_path):
    with pytest.raises(ConfigError, match="give --minutes or --steps"):
        main(["--out", str(tmp_path / "none"), "--device", "cpu"])
