"""Small random PixArt transformers of diffusers, the oracle of ours, and the way to ours."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.transformer import TransformerCheckpoint, load_transformer
from pixart_rt.config import ModelConfig
from pixart_rt.model.transformer import PixArtTransformer
from tests.training.conftest import plain_dit, plain_positions, random_dit

__all__ = ["ours_of", "plain_dit", "plain_positions", "random_dit", "reference", "small_config"]


@pytest.fixture(scope="session")
def small_config():
    """A factory of small configurations with the published head width, 72."""

    def make(**changes) -> ModelConfig:
        values = {"num_layers": 2, "num_heads": 2, "caption_channels": 40, **changes}
        return ModelConfig(**values)

    return make


@pytest.fixture(scope="session")
def reference():
    """A factory of diffusers models whose every parameter is random and not zero."""

    def make(config: ModelConfig, seed: int = 0) -> PixArtTransformer2DModel:
        model = PixArtTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            cross_attention_dim=config.hidden_size,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            interpolation_scale=config.interpolation_scale,
            use_additional_conditions=config.micro_conditioning,
            caption_channels=config.caption_channels,
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            # 1/sqrt(fan in) keeps activations near 1; published biases and tables are smaller.
            std = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def ours_of():
    """A factory of our module with a diffusers model's weights."""

    def make(model: PixArtTransformer2DModel, config: ModelConfig) -> PixArtTransformer:
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        ours = tensor_names.to_ours(
            state, config, tensor_names.diffusers_names, known=[], source="the reference"
        )
        return load_transformer(TransformerCheckpoint(config, ours, None, "the reference"))

    return make
