"""A recipe's phases: where each starts, what it leaves, and data that does not fit it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket, buckets
from pixart_rt.checkpoints.dit import read_dit
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.config import CfgNull, Precision
from pixart_rt.data.batch import Batch
from pixart_rt.errors import CheckpointError, ConfigError, DataError
from pixart_rt.training.optimizer_settings import OptimizerTable
from pixart_rt.training.phases import (
    is_done,
    phase_folder,
    phase_trainer,
    run_phase,
    run_settings,
    start_of,
)
from pixart_rt.training.presets import Preset
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.recipe import ModelShape, Phase, Recipe, Stage, Start, Weights, read_recipe
from pixart_rt.training.reparameterize import reparameterize
from pixart_rt.training.run_options import Compute, Overrides, Records, TrainOptions
from pixart_rt.training.run_settings import OptimizerKind

SHAPE = ModelShape(num_layers=2, num_heads=2, caption_channels=10, max_text_tokens=5, num_classes=4)
SHARED = {"data": "made up", "num_images": 9, "steps": 2, "batch_per_gpu": 2, "num_gpus": 1,
          "lr": 1e-3}  # fmt: skip
RECIPE = Recipe(
    preset=Preset.PAPER,
    model=SHAPE,
    ema_decay=0.5,
    phases=(
        Phase(name="pixels", stage=Stage.PIXEL_DEPENDENCY, start=Start.RANDOM, resolution=256,
              **SHARED),
        Phase(name="align", stage=Stage.TEXT_IMAGE_ALIGNMENT, start=Start.REPARAMETERIZED,
              resolution=256, **SHARED),
        Phase(name="large", stage=Stage.HIGH_AESTHETICS, start=Start.PREVIOUS, resolution=512,
              start_weights=Weights.RAW, multi_scale=True, micro_conditioning=True, **SHARED),
    ),
)  # fmt: skip
PIXELS, ALIGN, LARGE = RECIPE.phases
OPTIONS = TrainOptions(
    compute=Compute(precision=Precision.FP32, workers=0), records=Records(log=())
)


@dataclass
class MadeUp:
    """Samples of random numbers, spread over a resolution's buckets."""

    buckets: tuple[Bucket, ...]
    count: int = 9
    width: int = 10
    identity: str = "made up"

    @property
    def bucket_of(self) -> npt.NDArray[np.int64]:
        return np.arange(self.count) % len(self.buckets)

    @property
    def empty_prompt(self) -> Tensor:
        return torch.ones(1, self.width)

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Batch:
        bucket = self.buckets[int(self.bucket_of[ids[0]])]
        random = torch.Generator().manual_seed(ids[0])
        sides = bucket.height // 8, bucket.width // 8
        return Batch(
            ids=torch.tensor(ids),
            latents=torch.randn(len(ids), 4, *sides, generator=random),
            prompt_embeds=torch.randn(len(ids), 5, self.width, generator=random),
            prompt_mask=torch.arange(5) < torch.tensor([[3]] * len(ids)),
            original_size=torch.full((len(ids), 2), 300.0),
            aspect_ratio=torch.full((len(ids), 1), bucket.ratio),
            bucket=bucket,
            labels=torch.tensor(ids) % 4,
        )

    def finish(self, loaded: Batch) -> Batch:
        return loaded


def square(resolution: int) -> MadeUp:
    return MadeUp(tuple(each for each in buckets(resolution) if each.height == each.width))


def many(resolution: int) -> MadeUp:
    wanted = buckets(resolution)
    return MadeUp((wanted[0], *(each for each in wanted if each.height == each.width)))


@pytest.fixture(scope="module")
def ranks():
    with start_ranks("cpu") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def out(ranks, tmp_path_factory) -> Path:
    """The folder of a run of all three phases."""
    out = tmp_path_factory.mktemp("run")
    for phase, source in ((PIXELS, square(256)), (ALIGN, square(256)), (LARGE, many(512))):
        run_phase(RECIPE, phase, source, OPTIONS, out, ranks)
    return out


def test_each_phase_leaves_its_weights_in_a_format_of_others(out):
    dit = read_dit(phase_folder(RECIPE, PIXELS, out) / "dit-ema.pt", heads=2)
    assert dit.config.num_classes == 4 and dit.config.sample_size == 32
    for phase in (ALIGN, LARGE):
        for weights in Weights:
            path = phase_folder(RECIPE, phase, out) / f"transformer-{weights}"
            found = read_transformer(path)
            assert found.config == replace(
                phase.model_config(RECIPE.settings, SHAPE.config()), cfg_null=CfgNull.EMPTY_PROMPT
            )
            assert found.origin["trained"]["phase"] == phase.name
    large = read_transformer(phase_folder(RECIPE, LARGE, out) / "transformer-ema").config
    assert large.micro_conditioning and large.sample_size == 64 and large.interpolation_scale == 2


def test_a_phase_starts_from_what_the_one_before_left(out):
    dit = read_dit(phase_folder(RECIPE, PIXELS, out) / "dit-ema.pt", heads=2)
    text = replace(
        RECIPE.text_start, sample_size=32, interpolation_scale=1.0, caption_channels=10,
        max_text_tokens=5,
    )  # fmt: skip
    expected = reparameterize(dit, text).state
    found = start_of(RECIPE, ALIGN, out, None, 0).state
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    raw = read_transformer(phase_folder(RECIPE, ALIGN, out) / "transformer-raw").state
    found = start_of(RECIPE, LARGE, out, None, 0).state
    assert all(torch.equal(found[name], raw[name]) for name in raw)
    assert set(found) - set(raw) == {
        f"modulator.{kind}_embedder.mlp.{layer}.{part}"
        for kind in ("csize", "ar") for layer in (0, 2) for part in ("weight", "bias")
    }  # fmt: skip


def test_training_moved_the_weights_and_the_average_follows(out):
    folder = phase_folder(RECIPE, ALIGN, out)
    start = start_of(RECIPE, ALIGN, out, None, 0).state
    raw, ema = (read_transformer(folder / f"transformer-{each}").state for each in ("raw", "ema"))
    name = "blocks.0.attn.qkv.weight"
    moved, behind = (raw[name] - start[name]).abs(), (raw[name] - ema[name]).abs()
    assert 1e-4 < moved.max() <= 2.1e-3  # two steps of Adam at 1e-3
    assert 0 < behind.max() < moved.max()


def test_exposure_is_reported(out):
    rows = json.loads((phase_folder(RECIPE, LARGE, out) / "exposure.json").read_text())
    assert sum(row["steps"] for row in rows) == 2
    assert {(row["height"], row["width"]) for row in rows} == {(256, 1024), (512, 512)}


def test_a_phase_that_is_done_is_not_run_again(out, ranks):
    refusing = MadeUp((), count=0)
    assert is_done(RECIPE, PIXELS, OPTIONS, out)
    run_phase(RECIPE, PIXELS, refusing, OPTIONS, out, ranks)


def test_a_phase_needs_its_start(ranks, tmp_path):
    with pytest.raises(CheckpointError, match="run pixels first"):
        run_phase(RECIPE, ALIGN, square(256), OPTIONS, tmp_path, ranks)
    alone = replace(RECIPE, phases=(LARGE,))
    with pytest.raises(ConfigError, match="as `init`"):
        run_phase(alone, LARGE, many(512), OPTIONS, tmp_path, ranks)


@pytest.mark.parametrize("phase, source, says", [
    (PIXELS, many(256), "--square"),
    (PIXELS, square(512), "--res 256 --square"),
    (LARGE, square(512), "--res 512"),
    (LARGE, many(256), "--res 512"),
])  # fmt: skip
def test_data_of_other_shapes_is_refused(phase, source, says, ranks, tmp_path):
    with pytest.raises(DataError, match=says):
        phase_trainer(RECIPE, phase, source, OPTIONS, tmp_path, ranks)


def test_text_of_another_width_is_refused(out, ranks):
    source = replace(square(256), width=12)
    with pytest.raises(DataError, match="12 wide, the model takes 10"):
        phase_trainer(RECIPE, ALIGN, source, OPTIONS, out, ranks)


def test_a_null_that_features_lack_is_refused(out, ranks):
    null = replace(RECIPE.text_start, cfg_null=CfgNull.EMPTY_PROMPT_CAPTION_MASK)
    recipe = replace(RECIPE, text_start=null)
    with pytest.raises(ConfigError, match="padding"):
        phase_trainer(recipe, ALIGN, square(256), OPTIONS, out, ranks)


def test_settings_follow_the_preset_and_the_real_batch():
    code = replace(RECIPE, preset=Preset.ORIGINAL_CODE)
    settings = run_settings(code, ALIGN, replace(OPTIONS, overrides=Overrides(batch=1024)), 4)
    assert settings.lr == pytest.approx(2e-3) and settings.clip_norm == 0.01
    assert settings.eps == 1e-10 and settings.micro_batches == 1024 // 2, "of batch_per_gpu images"
    came = run_settings(
        code, ALIGN, replace(OPTIONS, overrides=Overrides(optimizer=OptimizerKind.CAME)), 1
    )
    assert came.eps is None and came.betas is None


def test_a_phase_that_is_done_as_something_else_is_refused(out, ranks):
    with pytest.raises(ConfigError, match="with steps 2, this run has 9"):
        run_phase(
            RECIPE, PIXELS, square(256), replace(OPTIONS, overrides=Overrides(steps=9)), out, ranks
        )
    with pytest.raises(ConfigError, match="with seed 0, this run has 3"):
        run_phase(RECIPE, PIXELS, square(256), replace(OPTIONS, seed=3), out, ranks)


def test_a_start_that_is_given_is_taken_in_place_of_random_weights(out):
    """As the original code starts: from a published DiT."""
    path = phase_folder(RECIPE, PIXELS, out) / "dit-ema.pt"
    found = start_of(RECIPE, PIXELS, out, path, 0)
    expected = read_dit(path, heads=2).state
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match="does not exist"):
        start_of(RECIPE, PIXELS, out, out / "nothing.pt", 0)


def test_a_recipes_settings_of_the_optimiser_reach_the_run():
    table = OptimizerTable(weight_decay=0.2, clip_norm=0.3, betas=(0.8, 0.9), eps=1e-6)
    own = replace(ALIGN, clip_norm=0.4, warmup_steps=7, decay=0.5)
    recipe = replace(RECIPE, optimizer=table, phases=(PIXELS, own, LARGE))
    found = run_settings(recipe, own, OPTIONS, 1)
    assert (found.weight_decay, found.clip_norm, found.betas, found.eps) == (
        0.2, 0.4, (0.8, 0.9), 1e-6,
    )  # fmt: skip
    assert (found.warmup.steps, found.decay) == (7, 0.5)
    assert run_settings(recipe, PIXELS, OPTIONS, 1).clip_norm == 0.3


def test_micro_batches_hold_what_the_recipe_gives_a_gpu():
    """Of the paper's 64 GPUs with 178 images: the same 64 parts on 1, 8 and 64 ranks."""
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "pixart-alpha.toml")
    align, last = recipe.phases[1], recipe.phases[4]
    for num_ranks in (1, 8, 64):
        assert run_settings(recipe, align, OPTIONS, num_ranks).micro_batches == 64
    assert run_settings(recipe, last, OPTIONS, 1).micro_batches == 32
    smaller = replace(OPTIONS, overrides=Overrides(batch=40))
    assert run_settings(recipe, last, smaller, 1).micro_batches == 4, "of 10 images, not 12"
    asked = replace(OPTIONS, overrides=Overrides(batch=40, micro_batches=8))
    assert run_settings(recipe, last, asked, 2).micro_batches == 8
    for batch, parts, num_ranks, says in (
        (40, None, 3, "40 images does not divide among 3 ranks"),
        (40, 16, 2, "`micro_batches` 16 was requested, but a step of 40 images"),
        (40, 5, 2, "`micro_batches` 5 was requested on 2 ranks"),
    ):
        asked = replace(OPTIONS, overrides=Overrides(batch=batch, micro_batches=parts))
        with pytest.raises(ConfigError, match=says):
            run_settings(recipe, last, asked, num_ranks)
