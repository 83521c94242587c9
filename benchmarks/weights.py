"""Random weights of a transformer, and diffusers' model with the same ones."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.configs import config_to_json
from pixart_rt.config import ModelConfig


def random_state(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Our names to float32, made on a device (a CPU takes a minute for the published model) and
    kept on the CPU; none zero: what starts at zero would hide all before it.
    """
    random = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in tensor_names.expected_shapes(config).items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        state[name] = torch.empty(shape, device=device).normal_(std=spread, generator=random).cpu()
    return state


def diffusers_model(config: ModelConfig, state: dict[str, Tensor]) -> PixArtTransformer2DModel:
    """On the CPU, float32."""
    values = {k: v for k, v in config_to_json(config).items() if not k.startswith("_")}
    model = PixArtTransformer2DModel(**values)
    tensors = tensor_names.from_ours(state, config, tensor_names.diffusers_names)
    model.load_state_dict(tensors, strict=False)  # its position table is computed
    return model
