"""How the parameters of a text model start, as in the original code: for training from scratch.

Gates are small but not zero (a table of deviation 1 / sqrt(D)); what is zero is cross-attention's
last linear and the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixart_rt.checkpoints.tensor_names import expected_shapes
from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import ModelConfig

EMBEDDING_STD = 0.02  # of the captions' projection, the scalars' embedders and t_block
_ZERO = ("bias", "cross_attn.proj.weight", "final_layer.linear.weight")
_EMBEDDINGS = ("y_proj.", "modulator.")


def initial_value(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    """The start of the parameter with our name `name`, float32."""
    value = torch.zeros(shape)
    if name.endswith(_ZERO):
        return value
    if name.endswith("scale_shift_table"):
        return value.normal_(std=1 / math.sqrt(shape[-1]), generator=random)
    if name.startswith(_EMBEDDINGS):
        return value.normal_(std=EMBEDDING_STD, generator=random)
    return torch.nn.init.xavier_uniform_(value, generator=random)


def from_scratch(config: ModelConfig, seed: int = 0) -> TransformerCheckpoint:
    """A text model that no DiT preceded."""
    random = torch.Generator().manual_seed(seed)
    state = {
        name: initial_value(name, shape, random) for name, shape in expected_shapes(config).items()
    }
    return TransformerCheckpoint(config, state, None, f"random weights, seed {seed}")
