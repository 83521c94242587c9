"""recipes/tiny.toml: the five phases as the paper orders them, and a short run from end to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tiny.data import main as make_data
from examples.tiny.scenes import SHAPES
from pixart_rt.checkpoints.dit import read_dit
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.config import Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.phases import run_settings
from pixart_rt.training.recipe import Stage, Start, read_recipe
from pixart_rt.training.run import train
from pixart_rt.training.run_options import Compute, Overrides, Records, TrainOptions
from pixart_rt.training.run_settings import OptimizerKind
from pixart_rt.training.validation import Validation, ValidationSettings

ROOT = Path(__file__).parents[3]
FILE = ROOT / "recipes" / "tiny.toml"
PHASES = ("01-pixel-dependency", "02-text-image-256", "03-aesthetics-256", "04-aesthetics-512",
          "05-aesthetics-1024")  # fmt: skip


def test_the_recipe_is_the_papers_in_miniature():
    recipe, paper = read_recipe(FILE), read_recipe(ROOT / "recipes" / "pixart-alpha.toml")
    for ours, theirs in zip(recipe.phases, paper.phases, strict=True):
        for name in ("name", "stage", "start", "resolution", "micro_conditioning"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (ours.data == "classes") == (ours.stage is Stage.PIXEL_DEPENDENCY)
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
    assert first.precision is last.precision is Precision.BF16
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


@pytest.fixture
def one_thread():
    """As the process that is killed has: sums of several are not bit-identical to those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The recipe with one block and few scenes, and its data, made by the script."""
    folder = tmp_path_factory.mktemp("short")
    text = re.sub(r"num_images = [\d_]+", "num_images = 4", FILE.read_text())
    text = re.sub(r"warmup_steps = \d+", "warmup_steps = 1", text)
    path = folder / "short.toml"
    path.write_text(text.replace("num_layers = 8", "num_layers = 1"))
    make_data(["--recipe", str(path), "--out", str(folder), "--device", "cpu"])
    names = ("classes", "squares", "scenes")
    return path, {name: f"{folder}/features/{name}-{{res}}" for name in names}


OPTIONS = TrainOptions(
    overrides=Overrides(steps=2, batch=1),
    # many CPUs have no products in bfloat16, and take minutes for a step of 1024 px
    compute=Compute(device="cpu", workers=0, precision=Precision.FP32),
    records=Records(log_every=1, save_every=1),
)


KILLED = f"""
import os, signal, sys
from pixart_rt.cli import main
from pixart_rt.training.trainer import Trainer

save = Trainer.save

def save_and_die(trainer):
    save(trainer)
    if trainer.out.name == "{PHASES[1]}":
        trainer.checkpoints.finish()
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.save = save_and_die
main(sys.argv[1:])
"""


def kill_in_the_second_phase(recipe: Path, data: dict[str, str], out: Path) -> None:
    """Start the same run by the command line; it dies once its first step of text is saved."""
    places = [word for name, path in data.items() for word in ("--data", f"{name}={path}")]
    command = [sys.executable, "-c", KILLED, "train", recipe, "--out", out, "--steps", "2",
               "--batch", "1", "--precision", "fp32", "--save-every", "1", "--log-every", "1",
               "--device", "cpu", "--workers", "0", *places]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert (out / PHASES[1] / "checkpoints" / "step-00000001").is_dir()
    assert not (out / PHASES[1] / "transformer-ema").exists()


@pytest.mark.slow
def test_five_phases_killed_and_resumed(short, tmp_path, one_thread):
    """Against the same run that nobody disturbed, bit for bit; then an image is drawn."""
    recipe, data = short
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = train(recipe, data, whole, options=OPTIONS)
    assert last == whole / PHASES[-1] / "transformer-ema"
    kill_in_the_second_phase(recipe, data, killed)
    train(recipe, data, killed, options=OPTIONS)

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
    assert origin is not None and origin["t"] == 500 and origin["trained"]["steps"] == 2

    checkpoint = read[0][1]
    settings = ValidationSettings(prompts=("a red circle above a blue square",))
    drawn = Validation("tiny", checkpoint.config, settings, torch.device("cpu")).images(
        load_transformer(checkpoint, torch.float32)
    )
    assert drawn.shape == (1, 3, 256, 256) and np.isfinite(drawn.numpy()).all()
