"""`pixart-rt finetune controlnet`: from pictures to a ControlNet that build takes, on tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_rt.checkpoints.controlnet import read_controlnet
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import read_transformer

SIZES = [(64, 64), (40, 90), (64, 64), (40, 90)]


@pytest.fixture
def stores(run: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Features of four pictures of two shapes, and of their edges."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        picture.save(images / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "a red circle"}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    assert run("data", "edges", images, tmp_path / "edges").code == 0
    for source, out in (("images", "features"), ("edges", "edge-features")):
        words = ("data", "extract", tmp_path / source, tmp_path / out, "--model", "tiny")
        assert run(*words, "--device", "cpu").code == 0
    return tmp_path / "features", tmp_path / "edge-features"


@pytest.mark.parametrize(("variant", "copies"), [("chained", 3), ("parallel", 8)])
def test_a_controlnet_is_trained_for_build(
    run: Callable[..., Any], stores: tuple[Path, Path], tmp_path: Path, variant: str, copies: int
) -> None:
    out = tmp_path / "control"
    words = ("finetune", "controlnet", *stores, "--model", "tiny", "--res", 256, "--out", out,
             "--variant", variant, "--steps", 2, "--batch", 2, "--device", "cpu", "--workers",
             0, "--lr", 1e-3)  # fmt: skip
    outcome = run(*words)
    assert (outcome.code, outcome.out) == (0, f"{out}\n"), outcome.err
    assert "training" in outcome.err
    base = read_transformer(TINY / "transformer_256")
    found = read_controlnet(out, base.config)
    assert (str(found.config.variant), found.config.num_copies) == (variant, copies)
    assert all(bool(tensor.any()) for name, tensor in found.state.items() if "after_proj" in name)
    name = "copies.0.block.mlp.fc1.weight"
    assert not torch.equal(found.state[name], base.state["blocks.0.mlp.fc1.weight"].float())
    again = run(*words)
    assert again.code == 2 and "--force" in again.error
    made = run("build", "--model", "tiny", "--res", 256, "--backend", "torch", "--components",
               "transformer", "--controlnet", out, "--out", tmp_path / "bundle")  # fmt: skip
    assert made.code == 0, made.err


def test_what_does_not_fit_is_refused(
    run: Callable[..., Any], stores: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("finetune", "controlnet", *stores, "--model", "tiny", "--out", tmp_path / "c",
             "--device", "cpu")  # fmt: skip
    assert "is a 1024 px model; extract them with --res 1024" in run(*words).error
    outcome = run(*words, "--res", 256, "--copies", 8)
    assert outcome.code == 2 and "which has place for 7" in outcome.error
    outcome = run(*words[:2], stores[0], tmp_path / "nothing", *words[4:], "--res", 256)
    assert outcome.code == 1 and "is no folder; give one that holds the store" in outcome.error
    pictures = (*words[:2], tmp_path / "images", *words[4:], "--res", 256)
    for given, reason in (
        ((*words[:3], *words[4:]), "give the store of what"),
        ((*words, "--condition", "canny"), "are for pictures"),
        ((*pictures[:3], stores[1], *pictures[3:]), "leave EDGES out"),
        ((*pictures, "--condition", "lines"), "choose one of canny, hed"),
    ):
        assert reason in run(*given).error
    assert not (tmp_path / "c").exists()


def test_pictures_are_read_with_their_edges(
    run: Callable[..., Any], stores: tuple[Path, Path], tmp_path: Path
) -> None:
    """Edges are found while training, by a worker (test_control.py: they are those of a store)."""
    out = tmp_path / "control"
    outcome = run("finetune", "controlnet", tmp_path / "images", "--model", "tiny", "--res", 256,
                  "--out", out, "--condition", "canny", "--steps", 1, "--batch", 2, "--device",
                  "cpu", "--workers", 1)  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = read_controlnet(out, read_transformer(TINY / "transformer_256").config)
    assert all(bool(tensor.any()) for name, tensor in found.state.items() if "after_proj" in name)
