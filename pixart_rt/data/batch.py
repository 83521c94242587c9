"""A training batch, and numbers drawn for it that depend on (seed, step, sample) alone.

B images, C latent channels, h×w latent pixels, T text tokens (the model's maximum; of images with
classes, which have no captions, the empty prompt's), E text width.
Every random number of a training step comes from a generator of its own: the same on any machine,
in any batch, with any number of workers or ranks. So a run resumes from its step and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.errors import ConfigError


class Stream(IntEnum):
    """What is drawn: the second half of Philox's key, so that no two uses share numbers."""

    LATENTS = 0x6C6174656E7473
    """The latents, of the VAE's distribution for an image. (The original drew once for all
    epochs.)"""
    NOISE = 0x6E6F697365
    """The noise that the model predicts, and the uniform numbers of its sample."""


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
    labels: Tensor | None = None  # [B] int64, the images' classes where the data set has them
    condition: Tensor | None = None  # [B, C, h, w] float32, the control images' scaled latents

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device; copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by a DataLoader that pins its batches."""
        return self._each(lambda tensor: tensor.pin_memory())

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1, as views: a micro-batch."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def draw_noise(
    seed: int,
    step: int,
    ids: Sequence[int],
    shape: Sequence[int],
    stream: Stream = Stream.LATENTS,
) -> Tensor:
    """Standard normal noise for every sample of a step: [len(ids), *shape] float32.

    Philox (Salmon et al., 2011) counts: key (seed, stream), counter (0, step, sample, 0).
    """
    noise = np.empty((len(ids), *shape), np.float32)
    for row, sample in enumerate(ids):
        generator = _generator(seed, step, sample, stream)
        generator.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)


def draw_uniform(seed: int, step: int, ids: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1) for every sample of a step: [len(ids), count] float64.

    They come after no number of draw_noise: the counter's last word is 1 here.
    """
    drawn = [_generator(seed, step, each, Stream.NOISE, 1).random(count) for each in ids]
    return torch.from_numpy(np.stack(drawn))


def _generator(
    seed: int, step: int, sample: int, stream: Stream, block: int = 0
) -> np.random.Generator:
    if seed < 0 or step < 0:
        raise ConfigError(f"seed {seed} and step {step} must not be negative")
    philox = np.random.Philox(key=[seed, stream], counter=[0, step, sample, block])
    return np.random.Generator(philox)
