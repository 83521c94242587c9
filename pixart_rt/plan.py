"""What a request shape needs once: positions and the modulation of every step, in one batched call.

B rows of a batch, S steps, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BundleError
from pixart_rt.model.conditioning import position_table
from pixart_rt.model.transformer import Modulator


@dataclass(frozen=True, slots=True)
class Plan:
    """pos_embed [1, N, D] and modulation [S, 7, D], float32, on the device."""

    pos_embed: Tensor
    modulation: Tensor


def load_modulator(path: Path, config: ModelConfig) -> Modulator:
    """The bundle's modulator in float32. Raises BundleError if the file is missing or damaged."""
    with torch.device("meta"):
        modulator = Modulator(config)
    try:
        modulator.load_state_dict(load_file(path), assign=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} is damaged ({reason}); build the bundle again") from error
    return modulator.eval().requires_grad_(False)


def make_plan(
    modulator: Modulator,
    config: ModelConfig,
    bucket: Bucket,
    timesteps: Tensor,
    device: torch.device,
    lossless: torch.dtype | None = None,
) -> Plan:
    """Positions of the bucket's grid and modulation of all timesteps [S].

    Micro-conditioning is the bucket's size in pixels and its height / width, float32, as in
    diffusers. Computed on the CPU in float32, whatever the engines' precision; for quality
    lossless in the dtype given, whose roundings are diffusers' then. So is the position table of
    the model's own square, which diffusers keeps as a buffer of its dtype.
    """
    steps = timesteps.float().cpu()
    size = torch.tensor([[bucket.height, bucket.width]], dtype=torch.float32)
    aspect_ratio = torch.tensor([bucket.height / bucket.width])
    modulator = modulator.to(lossless or torch.float32)
    with torch.inference_mode():
        modulation = modulator(steps, size.expand(len(steps), 2), aspect_ratio.expand(len(steps)))
    positions = position_table(config, bucket.grid)
    if lossless and bucket.grid == (config.base_size, config.base_size):
        positions = positions.to(lossless)
    return Plan(positions.float().to(device), modulation.float().to(device))
