"""The next phase starts with what the model computed at the end of the one before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
    write_diffusers,
)
from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.next_phase import for_next_phase
from pixart_rt.training.phases import start_of
from pixart_rt.training.presets import PRESETS, Preset
from pixart_rt.training.recipe import ModelShape, read_recipe

OLD = ModelConfig(
    num_layers=2, num_heads=1, caption_channels=12, max_text_tokens=5, sample_size=64,
    interpolation_scale=1.0, micro_conditioning=False,
)  # fmt: skip


@pytest.fixture
def checkpoint() -> TransformerCheckpoint:
    torch.manual_seed(0)
    return TransformerCheckpoint(OLD, PixArtTransformer(OLD).state_dict(), None, "before")


def run(checkpoint, pos_embed, *conditions):
    model = load_transformer(checkpoint)
    random = torch.Generator().manual_seed(1)
    modulation = model.modulator(torch.tensor([3.0, 700.0]), *conditions)
    tokens = torch.randn(2, 6, OLD.token_channels, generator=random)
    text = torch.randn(2, 5, 12, generator=random)
    return model, model(tokens, pos_embed, modulation, text, torch.ones(2, 5, dtype=torch.bool))


def test_the_last_phase_starts_as_the_one_before_ended(checkpoint, tmp_path):
    """Sizes and aspect ratios add nothing yet, and get gradients."""
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "pixart-alpha.toml")
    config = recipe.phases[-1].model_config(PRESETS[Preset.ORIGINAL_CODE], OLD)
    assert config == replace(OLD, sample_size=128, interpolation_scale=2.0, micro_conditioning=True)
    grown = for_next_phase(checkpoint, config)
    write_diffusers(grown, tmp_path / "transformer")
    assert read_transformer(tmp_path / "transformer").config == config
    pos_embed = torch.randn(1, 6, OLD.hidden_size)
    _, expected = run(checkpoint, pos_embed)
    conditions = torch.tensor([[512.0, 1024.0], [700.0, 30.0]]), torch.tensor([0.5, 4.0])
    model, output = run(grown, pos_embed, *conditions)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    output.square().sum().backward()
    for embedder in (model.modulator.csize_embedder, model.modulator.ar_embedder):
        assert embedder.mlp[2].weight.grad.abs().max() > 0
        assert embedder.mlp[0].weight.std() > 0.01


def test_another_resolution_changes_no_tensor(checkpoint):
    grown = for_next_phase(checkpoint, replace(OLD, sample_size=128, interpolation_scale=4.0))
    assert grown.config.interpolation_scale == 4.0
    assert all(grown.state[name] is tensor for name, tensor in checkpoint.state.items())


def test_what_cannot_change(checkpoint):
    with pytest.raises(ConfigError, match="can change between phases"):
        for_next_phase(checkpoint, replace(OLD, num_layers=3))
    micro = for_next_phase(checkpoint, replace(OLD, micro_conditioning=True))
    with pytest.raises(ConfigError, match="is micro-conditioned"):
        for_next_phase(micro, OLD)


@pytest.mark.parametrize(("asked", "expected"), [(None, 2.0), (4.0, 4.0), (2.0, 2.0)])
def test_a_start_of_the_phases_resolution_keeps_its_positions(
    asked, expected, checkpoint, tmp_path, caplog
):
    """own-images.toml on published weights: the preset's positions are for another resolution."""
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "own-images.toml")
    phase = replace(recipe.phases[0], micro_conditioning=False, interpolation_scale=asked)
    shape = ModelShape(num_layers=2, num_heads=1, caption_channels=12, max_text_tokens=5)
    recipe = replace(recipe, phases=(phase,), model=shape)
    config = replace(checkpoint.config, sample_size=128, interpolation_scale=2.0)
    write_diffusers(replace(checkpoint, config=config), tmp_path / "start")
    assert phase.model_config(recipe.settings, OLD).interpolation_scale == (asked or 4.0)
    start = start_of(recipe, phase, tmp_path / "out", tmp_path / "start", 0)
    assert start.config.interpolation_scale == expected
    assert ("changes the positions" in caplog.text) == (expected != 2.0)
