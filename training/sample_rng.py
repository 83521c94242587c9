"""What a step draws for each sample: noise, and uniform numbers for its timestep and the rest.

B samples, C latent channels, h×w latent pixels. Drawn on the host, for the sample's id alone
(pixart_rt/data/batch.py), so that no rank and no micro-batch changes another's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_rt.data.batch import Batch, Stream, draw_noise, draw_uniform

TIMESTEP, DROPPED, GUIDANCE = 0, 1, 2  # which uniform number is for what
UNIFORMS = 3


@dataclass(frozen=True, slots=True)
class Draws:
    """noise [B, C, h, w] float32 and uniform [B, UNIFORMS] float64 in [0, 1)."""

    noise: Tensor
    uniform: Tensor

    def timesteps(self, count: int, shift: float = 1.0) -> Tensor:
        """[B] int64 in 0..count-1, each equally often where shift is 1, as the paper trains.

        A larger shift s draws more noise, s u / (1 + (s - 1) u) for a uniform u: at more pixels the
        same noise hides less (arXiv:2403.03206, Section 5.3.2).
        """
        u = self.uniform[:, TIMESTEP]
        return (shift * u / (1 + (shift - 1) * u) * count).long()

    def dropped(self, share: float) -> Tensor:
        """[B] boolean: which captions or labels are dropped, each with probability `share`."""
        return self.uniform[:, DROPPED] < share

    def rows(self, start: int, stop: int) -> Draws:
        """Of the samples start..stop-1."""
        return Draws(self.noise[start:stop], self.uniform[start:stop])

    def to(self, device: torch.device) -> Draws:
        """On a GPU without waiting for what it is at work on: through pinned memory."""
        noise, uniform = self.noise, self.uniform
        if device.type == "cuda":
            noise, uniform = noise.pin_memory(), uniform.pin_memory()
        return Draws(noise.to(device, non_blocking=True), uniform.to(device, non_blocking=True))


def draw(seed: int, step: int, batch: Batch) -> Draws:
    """The draws of a step for a batch, on the CPU."""
    ids = batch.ids.tolist()
    noise = draw_noise(seed, step, ids, batch.latents.shape[1:], Stream.NOISE)
    return Draws(noise, draw_uniform(seed, step, ids, UNIFORMS))
