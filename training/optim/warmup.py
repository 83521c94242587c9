"""A constant learning rate after a linear warm-up, and its end; counted in optimiser steps.

A pure function of the step, so that resuming needs one integer. Gradient accumulation and the
number of processes do not enter: the original code's scheduler was advanced once per process, and
its 1000 steps of warm-up were over after 16 on 64 GPUs (presets.py states that as it acts).
Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixart_rt.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """The share of the learning rate at each optimiser step, counted from 0."""

    steps: float = 0.0  # optimiser steps until the full rate; 0 for none
    from_zero: bool = False  # the first step's share is 0 instead of 1 / steps, as LambdaLR starts

    def __post_init__(self) -> None:
        if not self.steps >= 0:
            raise ConfigError(f"warm-up steps must be >= 0, got {self.steps}")

    def share(self, step: int) -> float:
        """In 0..1; 1 from the end of the warm-up on."""
        done = step if self.from_zero else step + 1
        return 1.0 if done >= self.steps else done / self.steps


def cosine_end(step: int, steps: int, share: float) -> float:
    """The share of the rate where it falls to zero over the last `share` of `steps`, in 0..1.

    By half a cosine; 1 before. With share 0 the rate is constant to the last step, as the paper's.
    """
    length = share * steps
    left = steps - step
    return 1.0 if left >= length else 0.5 - 0.5 * math.cos(math.pi * left / length)
