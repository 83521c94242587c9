"""The start of a text model, parameter by parameter, as the original code has it."""

from __future__ import annotations

import math

import torch

from pixart_rt.checkpoints.transformer import load_transformer
from pixart_rt.config import ModelConfig
from pixart_rt.training.weight_init import from_scratch

CONFIG = ModelConfig(num_layers=1, num_heads=2, caption_channels=96, sample_size=32)
D = CONFIG.hidden_size
EMBEDDERS = [f"modulator.{kind}_embedder.mlp.{i}" for kind in ("t", "csize", "ar") for i in (0, 2)]
NORMAL = {
    **dict.fromkeys(["modulator.t_block.1", "y_proj.fc1", "y_proj.fc2", *EMBEDDERS], 0.02),
    "blocks.0.scale_shift_table": D**-0.5,
    "final_layer.scale_shift_table": D**-0.5,
}
ZERO = {"blocks.0.cross_attn.proj", "final_layer.linear"}


def test_every_parameter_starts_as_in_the_original_code():
    """Deviations within four standard errors; xavier's range is met and not passed."""
    state = from_scratch(CONFIG).state
    for name, value in state.items():
        module = name.removesuffix(".weight").removesuffix(".bias")
        if name.endswith("bias") or module in ZERO:
            assert not value.any(), name
            continue
        if module in NORMAL:
            error = 4 / math.sqrt(2 * value.numel())
            assert abs(value.std() / NORMAL[module] - 1) < error, name
            assert value.abs().max() > 2.2 * NORMAL[module], "normal, not uniform"
        else:
            outputs, inputs = value.shape
            bound = math.sqrt(6 / (inputs + outputs))
            assert 0.98 * bound < value.abs().max() <= bound, name
    assert {name.removesuffix(".weight") for name in state} >= {*NORMAL, *ZERO}


def test_it_draws_nothing_yet_and_equal_seeds_are_equal():
    model = load_transformer(from_scratch(CONFIG))
    modulation = torch.randn(2, 7, D)
    text, mask = torch.randn(2, 5, 96), torch.ones(2, 5, dtype=torch.bool)
    assert not model(torch.randn(2, 6, 16), torch.randn(1, 6, D), modulation, text, mask).any()
    one, same, other = (
        from_scratch(CONFIG, seed).state["blocks.0.mlp.fc1.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
