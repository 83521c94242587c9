"""A training batch, the noise that draws it, and bfloat16 as bytes.

B images, C latent channels, h×w latent pixels, T text tokens (the model's maximum), E text width.
The VAE gives a normal distribution for an image. Latents are drawn from it anew at every step, from
a generator of their own for (seed, step, sample): the same on any machine, in any batch, with any
number of workers. (The original drew once for all epochs.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.errors import ConfigError

_STREAM = 0x6C6174656E7473  # the second half of Philox's key, so that no other use repeats ours


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a training step reads, of one bucket."""

    ids: Tensor  # [B] int64, global sample ids
    latents: Tensor  # [B, C, h, w] float32, times the VAE's scaling factor
    prompt_embeds: Tensor  # [B, T, E] bfloat16, zero where the mask is False
    prompt_mask: Tensor  # [B, T] bool, True at tokens
    original_size: Tensor  # [B, 2] float32: height, width of the picture in its file
    aspect_ratio: Tensor  # [B, 1] float32: the bucket's key, height / width
    bucket: Bucket

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device; copies from pinned memory do not wait."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids", "latents", "prompt_embeds", "prompt_mask", "original_size",
                         "aspect_ratio")
        }  # fmt: skip
        return Batch(**moved, bucket=self.bucket)

    def pin_memory(self) -> Batch:
        """Called by a DataLoader that was asked to pin its batches."""
        pinned = {
            name: getattr(self, name).pin_memory()
            for name in ("ids", "latents", "prompt_embeds", "prompt_mask", "original_size",
                         "aspect_ratio")
        }  # fmt: skip
        return Batch(**pinned, bucket=self.bucket)


def draw_noise(seed: int, step: int, ids: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise for every sample of a step: [len(ids), *shape] float32.

    Philox (Salmon et al., 2011) counts: key (seed, stream), counter (0, step, sample, 0).
    """
    if seed < 0 or step < 0:
        raise ConfigError(f"seed {seed} and step {step} must not be negative")
    noise = np.empty((len(ids), *shape), np.float32)
    for row, sample in enumerate(ids):
        philox = np.random.Philox(key=[seed, _STREAM], counter=[0, step, sample, 0])
        np.random.Generator(philox).standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)


def pad_text(features: Sequence[Tensor], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Unpadded features, each [n, E] bfloat16, to [B, T, E] and their mask [B, T] bool."""
    embeds = torch.zeros(len(features), max_tokens, features[0].shape[1], dtype=torch.bfloat16)
    mask = torch.zeros(len(features), max_tokens, dtype=torch.bool)
    for row, feature in enumerate(features):
        embeds[row, : len(feature)] = feature
        mask[row, : len(feature)] = True
    return embeds, mask


def bfloat16_to_bytes(values: Tensor) -> bytes:
    """A bfloat16 tensor as its bit patterns: little-endian 16-bit words, row by row."""
    bits = values.contiguous().view(torch.int16).numpy()
    return bits.astype("<i2", copy=False).tobytes()


def bfloat16_from_bytes(data: bytes | memoryview, width: int) -> Tensor:
    """The [rows, width] bfloat16 tensor of bit patterns that bfloat16_to_bytes wrote."""
    bits = np.frombuffer(data, "<i2").reshape(-1, width).astype(np.int16)  # a copy: writable
    return torch.from_numpy(bits).view(torch.bfloat16)
