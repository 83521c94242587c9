"""`reparameterize` from a file to a file; what it computes is tested in tests/training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt.checkpoints.dit import WEIGHTS, DiTCheckpoint, write_dit
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.cli.reparameterize import Which
from pixart_rt.model.dit import DiT, DiTConfig


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    config = DiTConfig(num_classes=3, num_layers=2, num_heads=2, head_dim=8, sample_size=8)
    write_dit(DiTCheckpoint(config, DiT(config).state_dict(), "memory"), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


SMALL = ("--heads", 2, "--caption-channels", 24, "--max-text-tokens", 9)


def test_a_folder_and_a_pth(run: Callable[..., Any], dit: Path, tmp_path: Path) -> None:
    folder, pth = tmp_path / "transformer", tmp_path / "start.pth"
    outcome = run("reparameterize", dit, folder, *SMALL)
    assert (outcome.code, outcome.out) == (0, f"{folder}\n")
    assert "origin.json" in outcome.err
    outcome = run("reparameterize", dit, pth, *SMALL, "--json", "--t", 250, "--t-block", "block0")
    assert outcome.code == 0
    origin = json.loads(outcome.out)["origin"]
    assert (origin["t"], origin["t_block"]) == (250, "block0")
    found, other = read_transformer(folder), read_transformer(pth)
    assert other.origin == origin and found.origin is not None
    assert found.config == other.config and found.config.caption_channels == 24
    name = "modulator.t_block.1.weight"
    assert not torch.equal(found.state[name], other.state[name])


def test_another_resolution_and_back(run: Callable[..., Any], dit: Path, tmp_path: Path) -> None:
    """Through `convert`, which keeps where the weights come from."""
    out, pth, back = tmp_path / "out", tmp_path / "out.pth", tmp_path / "back"
    assert run("reparameterize", dit, out, *SMALL, "--sample-size", 16).code == 0
    assert run("convert", out, pth).code == 0 and run("convert", pth, back).code == 0
    found = read_transformer(back)
    assert (found.config.sample_size, found.config.interpolation_scale) == (16, 2.0)
    assert found.origin == read_transformer(out).origin


def test_bad_use_is_one_line(run: Callable[..., Any], dit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, code, message in (
        ((dit, out, *SMALL, "--t", 1000), 2, "between 0 and 999"),
        ((dit, out, "--heads", 7), 2, "7 heads do not divide"),
        ((dit, out, "--t-block", "median"), 2, "median"),
        ((dit, out, *SMALL, "--which", "ema"), 2, "has plain tensors"),
        ((tmp_path / "absent.pt", out), 1, "absent.pt does not exist"),
        ((dit, dit, *SMALL), 2, "is a file; name a folder"),
    ):
        outcome = run("reparameterize", *words)
        assert outcome.code == code, words
        assert message in outcome.error
        assert not out.exists()


def test_the_weights_have_the_readers_names() -> None:
    assert {str(each) for each in Which} == set(WEIGHTS)
