"""How the phases are optimised: as the paper says, and as the original code really does.

They differ by more than they agree on. Paper: Sections 3.1 and A.5 (arXiv:2310.00426). Code:
PixArt-alpha's stage configurations and what its libraries make of them:
- `auto_lr` multiplies the rate by sqrt(batch / 256), batch being that of all GPUs;
- gradients are clipped to a norm of 0.01 over all parameters, so a gradient's RMS is below 4.1e-7
  and Adam's eps must be smaller still: 1e-10;
- accelerate advances the scheduler once per process: 1000 warm-up steps on 64 GPUs are over after
  16. The first step has rate 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.warmup import Warmup

PIXART_PARAMETERS = 610_856_096  # XL/2 without micro-conditioning


class Preset(StrEnum):
    PAPER = "paper"
    ORIGINAL_CODE = "original-code"


class LrRule(StrEnum):
    """How a phase's rate depends on its batch."""

    CONSTANT = "constant"
    SQRT = "sqrt"
    """Times sqrt(batch / 256)."""


class Positions(StrEnum):
    """Positions at a larger resolution than the one before."""

    DIFFFIT = "DiffFit"
    """Interpolated into the range of 256 px (arXiv:2304.06648), as the paper says (A.5)."""
    RELEASED = "released"
    """As in the released weights: 0..32 at 512 and at 1024 px, twice the range of 256 px."""


_RELEASED_SCALES = {256: 1.0, 512: 1.0, 1024: 2.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One preset's optimiser: AdamW with a constant rate after the warm-up."""

    lr_rule: LrRule
    lr_batch: int = 256  # the batch at which LrRule.SQRT changes nothing
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float
    clip_norm: float  # of the gradients of all parameters together
    warmup_steps: int  # as configured
    warmup_per_process: bool  # whether each process counts, as accelerate's scheduler does
    positions: Positions
    original_batches: bool  # whether a phase's batch is the released configuration's

    def __post_init__(self) -> None:
        for name in ("lr_batch", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")

    def effective_lr(self, lr: float, batch: int) -> float:
        """The rate of a step on `batch` images of all GPUs and accumulated micro-batches."""
        return lr * math.sqrt(batch / self.lr_batch) if self.lr_rule is LrRule.SQRT else lr

    def effective_warmup(self, num_processes: int) -> float:
        """Optimiser steps until the full rate."""
        return self.warmup_steps / (num_processes if self.warmup_per_process else 1)

    def warmup(self, num_processes: int) -> Warmup:
        """The schedule as it acts; LambdaLR, which the original code has, starts at 0."""
        steps = self.effective_warmup(num_processes)
        return Warmup(steps=steps, from_zero=self.warmup_per_process)

    def clipped_rms(self, num_parameters: int = PIXART_PARAMETERS) -> float:
        """The largest RMS of a gradient's values after clipping."""
        return self.clip_norm / math.sqrt(num_parameters)

    def clip_ratio(self, num_parameters: int = PIXART_PARAMETERS) -> float:
        """That RMS over Adam's eps. Near or below 1 the eps, not the gradient, sets the step."""
        return self.clipped_rms(num_parameters) / self.eps

    def interpolation_scale(self, resolution: int) -> float:
        """What positions are divided by (ModelConfig.interpolation_scale)."""
        if self.positions is Positions.DIFFFIT:
            return resolution / 256
        return _RELEASED_SCALES[resolution]


PRESETS = {
    Preset.PAPER: Settings(
        lr_rule=LrRule.CONSTANT,
        weight_decay=0.03,
        eps=1e-8,  # not stated: PyTorch's
        clip_norm=1.0,  # not stated: the original code's base configuration
        warmup_steps=0,  # "a constant 2e-5 learning rate"
        warmup_per_process=False,
        positions=Positions.DIFFFIT,
        original_batches=False,
    ),
    Preset.ORIGINAL_CODE: Settings(
        lr_rule=LrRule.SQRT,
        weight_decay=0.03,
        eps=1e-10,
        clip_norm=0.01,
        warmup_steps=1000,
        warmup_per_process=True,
        positions=Positions.RELEASED,
        original_batches=True,
    ),
}
