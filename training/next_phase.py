"""A text model's weights for the next phase: another resolution, and micro-conditioning.

Positions are computed from the configuration, so that another resolution changes no tensor. The
embedders of image size and aspect ratio are new in the last phase (1024-MS); the last linear of
each starts at zero, so that the phase begins with the model that the one before ended with. In the
original code they start random.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pixart_rt.checkpoints.tensor_names import expected_shapes
from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError
from pixart_rt.training.weight_init import initial_value

_MAY_CHANGE = ("sample_size", "interpolation_scale", "micro_conditioning")


def for_next_phase(
    checkpoint: TransformerCheckpoint, config: ModelConfig, seed: int = 0
) -> TransformerCheckpoint:
    """The checkpoint under the next phase's configuration (`Phase.model_config`).

    Raises ConfigError where more than resolution and positions differs, or where weights of
    micro-conditioning would be lost.
    """
    old = checkpoint.config
    same = {name: getattr(old, name) for name in _MAY_CHANGE}
    if replace(config, **same) != old:
        raise ConfigError(
            f"the next phase of {checkpoint.source} was requested as {config}, but only "
            f"{', '.join(_MAY_CHANGE)} can change between phases; it is {old}"
        )
    if old.micro_conditioning and not config.micro_conditioning:
        raise ConfigError(
            f"{checkpoint.source} is micro-conditioned and the next phase is not; set "
            "micro_conditioning in it, or start from a checkpoint without"
        )
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        if name in checkpoint.state:
            state[name] = checkpoint.state[name]
            continue
        state[name] = initial_value(name, shape, random)
        if name.endswith("mlp.2.weight"):
            state[name].zero_()
    return replace(checkpoint, config=config, state=state)
