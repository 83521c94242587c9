"""recipes/tiny.toml: the five phases as the paper orders them, and a short run from end to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart_rt.checkpoints.dit import read_dit
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.errors import ConfigError
from pixart_rt.training.phases import run_settings
from pixart_rt.training.recipe import Stage, Start, read_recipe
from pixart_rt.training.run_options import Overrides, TrainOptions
from pixart_rt.training.run_settings import OptimizerKind
from pixart_rt.training.tiny.kinds import Scenes
from pixart_rt.training.tiny.scenes import SHAPES
from pixart_rt.training.validation import Validation, ValidationSettings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "recipes" / "tiny.toml"
PHASES = ("01-pixel-dependency", "02-text-image-256", "03-aesthetics-256", "04-aesthetics-512",
          "05-aesthetics-1024")  # fmt: skip


def test_the_recipe_is_the_papers_in_miniature():
    recipe, paper = read_recipe(FILE), read_recipe(ROOT / "recipes" / "pixart-alpha.toml")
    for ours, theirs in zip(recipe.phases, paper.phases, strict=True):
        for name in ("name", "stage", "start", "resolution", "micro_conditioning"):
            assert getattr(ours, name) == getattr(theirs, name)
        classes = ours.stage is Stage.PIXEL_DEPENDENCY
        assert ours.data == (Scenes.CLASSES if classes else Scenes.DENSE)
    shapes = [each.multi_scale for each in recipe.phases]
    assert [each.multi_scale for each in paper.phases] == [False, False, False, True, True]
    assert shapes == [False, False, True, True, True], "a departure that the recipe names"
    assert recipe.phases[1].start is Start.REPARAMETERIZED
    assert recipe.model.num_classes == len(SHAPES)
    last = recipe.phases[-1].model_config(recipe.settings, recipe.model.config())
    assert last == read_transformer(TINY / "transformer").config
    square = recipe.phases[2].model_config(recipe.settings, recipe.model.config())
    assert square == read_transformer(TINY / "transformer_256").config


def test_what_departs_from_the_paper_reaches_the_runs_settings():
    recipe, paper = read_recipe(FILE), read_recipe(ROOT / "recipes" / "pixart-alpha.toml")
    first, *_, last = (run_settings(recipe, each, TrainOptions(), 1) for each in recipe.phases)
    assert first.optimizer is last.optimizer is OptimizerKind.MUON
    assert (first.warmup.steps, first.decay) == (100, 0) and (last.warmup.steps, last.decay) == (
        50,
        1,
    )
    assert first.rate(0) == pytest.approx(2.2e-5) and first.rate(first.steps - 1) == 2.2e-3
    assert 0 < last.rate(last.steps - 1) < 1e-3 * last.lr
    options = TrainOptions(overrides=Overrides(optimizer=OptimizerKind.ADAMW))
    assert run_settings(recipe, recipe.phases[0], options, 1).optimizer is OptimizerKind.ADAMW
    plain = run_settings(paper, paper.phases[0], TrainOptions(), 1)
    assert (plain.optimizer, plain.decay, plain.warmup.steps) == (OptimizerKind.ADAMW, 0, 0)
    with pytest.raises(ConfigError, match="decay must be between 0 and 1"):
        replace(recipe.phases[0], decay=-0.5)


def short_recipe(folder: Path) -> Path:
    """The recipe with a small model and few scenes."""
    text = re.sub(r"num_images = [\d_]+", "num_images = 6", FILE.read_text())
    text = re.sub(r"warmup_steps = \d+", "warmup_steps = 1", text)
    path = folder / "short.toml"
    path.write_text(text.replace("num_layers = 8", "num_layers = 1"))
    return path


def started(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pixart_rt", "train", recipe, "--out", out, "--steps", "3",
               "--batch", "2", "--save-every", "1", "--log-every", "1", "--device",
               "cpu"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return out.strip()


@pytest.mark.slow
def test_five_phases_killed_and_gone_on_with(tmp_path):
    """Against the same run that nobody disturbed, bit for bit; then an image is drawn."""
    recipe = short_recipe(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finished(started(recipe, whole)) == str(whole / PHASES[-1] / "transformer-ema")

    process = started(recipe, killed)
    saved = killed / PHASES[1] / "checkpoints" / "step-00000001"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / PHASES[1] / "transformer-ema").exists(), "killed too late to say anything"
    finished(started(recipe, killed))

    dits = [read_dit(run / PHASES[0] / "dit-ema.pt", heads=2) for run in (whole, killed)]
    assert dits[0].config.num_classes == len(SHAPES)
    read = [[read_transformer(run / phase / "transformer-ema") for phase in PHASES[1:]]
            for run in (whole, killed)]  # fmt: skip
    for one, other in zip([dits[0], *read[0]], [dits[1], *read[1]], strict=True):
        assert one.state.keys() == other.state.keys()
        assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    resolutions = [each.config.resolution for each in read[0]]
    assert resolutions == [256, 256, 512, 1024]
    assert [each.config.micro_conditioning for each in read[0]] == [False, False, False, True]
    origin = read[0][0].origin
    assert origin is not None and origin["t"] == 500 and origin["trained"]["steps"] == 3

    checkpoint = read[0][1]
    settings = ValidationSettings(prompts=("a red circle above a blue square",))
    drawn = Validation("tiny", checkpoint.config, settings, torch.device("cpu")).images(
        load_transformer(checkpoint, torch.float32)
    )
    assert drawn.shape == (1, 3, 256, 256) and np.isfinite(drawn.numpy()).all()
