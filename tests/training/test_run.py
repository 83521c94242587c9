"""`pixart_rt.train`: the function behind the verb, its checks and what it returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pixart_rt
from examples.tiny.data import Scenes, SceneSet, open_encoder, scene_store
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.errors import ConfigError
from pixart_rt.training.presets import Preset
from pixart_rt.training.progress import silent
from pixart_rt.training.recipe import ModelShape, Phase, Recipe, Stage, Start
from pixart_rt.training.run import replay_step, train
from pixart_rt.training.run_options import (
    Compute,
    Overrides,
    Records,
    TrainOptions,
    ValidationImages,
)

RECIPE = Recipe(
    preset=Preset.PAPER,
    ema_decay=0.5,
    model=ModelShape(num_layers=8, num_heads=2, caption_channels=128),
    phases=(
        Phase(name="text", stage=Stage.TEXT_IMAGE_ALIGNMENT, start=Start.PREVIOUS, resolution=256,
              data="pictures", num_images=2, steps=2, batch_per_gpu=1, num_gpus=1, lr=1e-3),
    ),
)  # fmt: skip
OPTIONS = TrainOptions(
    overrides=Overrides(steps=1), compute=Compute(device="cpu", workers=0), records=Records(log=())
)


def test_it_is_a_public_name() -> None:
    assert pixart_rt.train is train


def draw_store(folder: Path) -> Path:
    """A feature store of two drawn squares."""
    scenes = SceneSet(kind=Scenes.DENSE, count=2, resolution=256, square=True)
    return scene_store(scenes, folder, "pictures", open_encoder(torch.device("cpu")), silent).path


def test_a_recipe_is_trained_into_a_pipeline(tmp_path: Path, caplog: Any) -> None:
    """AdamW's first step moves a weight w by 1e-3 (±1 + 0.03 w); the average goes half the way."""
    data = {"pictures": draw_store(tmp_path / "data")}
    caplog.set_level("INFO", logger="pixart_rt")
    result = train(RECIPE, data, tmp_path / "run", init="tiny", pipeline="tiny", options=OPTIONS)
    assert result == tmp_path / "run" / "pipeline"
    name = "blocks.3.mlp.fc1.weight"
    start = read_transformer(TINY / "transformer_256").state[name].float()
    moved = read_transformer(result).state[name] - start
    assert (moved + 0.5e-3 * 0.03 * start).abs().max() == pytest.approx(0.5e-3, rel=1e-3)
    assert "phase text: 2 samples, 1 steps of 1 images" in caplog.text
    done = train(RECIPE, data, tmp_path / "run", options=OPTIONS)
    assert done == tmp_path / "run" / "01-text" / "transformer-ema"
    assert torch.equal(read_transformer(done).state[name], read_transformer(result).state[name])
    report = replay_step(RECIPE, data, tmp_path / "run", "text", 1, init="tiny", options=OPTIONS)
    assert report["finite"] and report["from_checkpoint"] == 1
    json.dumps(report)


IMAGES = ValidationImages(model="tiny", every=1, prompts=("a circle",))
CLASSES = replace(
    RECIPE,
    phases=(replace(RECIPE.phases[0], stage=Stage.PIXEL_DEPENDENCY, start=Start.RANDOM),),
)


@pytest.mark.parametrize("call, says", [
    (lambda out: train(RECIPE, {}, out, phases=["texts"]), "`phases=texts` was requested.* text"),
    (lambda out: train(RECIPE, {"nose": "x"}, out), r"`data\['nose'\]` names no data"),
    (lambda out: train(RECIPE, {"text": out / "x"}, out), "check `data`"),
    (lambda out: train(CLASSES, {}, out, pipeline="tiny"), "`pipeline` was requested, but the"),
    (lambda out: train(CLASSES, {}, out, options=replace(OPTIONS, validation=IMAGES)),
     "leave out `validation`"),
    (lambda out: train(RECIPE, {}, out), r"trains on pictures; .* `data\['pictures'\]`"),
    (lambda out: train(RECIPE, {"text": draw_store(out)}, out, options=OPTIONS),
     "start from as `init`"),
    (lambda out: Overrides(batch=0), "`batch` must be > 0, got 0"),
    (lambda out: Compute(workers=-1), "`workers` must be >= 0"),
    (lambda out: Records(log=("paper",)), "`log=paper` is not supported; choose from console"),
    (lambda out: Records(keep=0), "`keep` must be > 0"),
    (lambda out: replace(IMAGES, every=0), "`validate_every` must be > 0"),
    (lambda out: replace(IMAGES, prompts=()), "without a prompt"),
    (lambda out: TrainOptions(seed=-1), "`seed` must be >= 0"),
])  # fmt: skip
def test_errors_name_the_arguments(
    call: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        call(tmp_path / "run")
