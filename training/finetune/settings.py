"""How a model is adapted to a few pictures: DreamBooth (paper, Section A.9) and LoRA.

Imports no torch. What the original code has where it differs:
- its DreamBooth runs 200 epochs, not 300 steps, and still drops one caption in ten;
- its LoRA script has rank 4, alpha 8 (peft's default), a rate of 1e-6, and adapts the linears
  outside the blocks too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pixart_rt.errors import ConfigError


class LoraTargets(StrEnum):
    """Which linears of the blocks get an adapter. What stands outside the blocks never does."""

    ATTENTION = "attention"
    """Self- and cross-attention."""
    ALL = "all"
    """And the MLPs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """W + alpha / rank · B A with A [rank, inputs], B [outputs, rank] (LoRA, arXiv:2106.09685).

    There is no dropout: a step draws nothing but what its sample's id says.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: LoraTargets = LoraTargets.ATTENTION

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of a LoRA must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """One run on a few pictures; optimiser as the released DreamBooth configuration has it."""

    steps: int = 300
    lr: float = 5e-6
    batch: int = 1  # images of a step; with prior preservation as many of the class besides
    prior_weight: float = 1.0  # of the class pictures' mean loss, where there are any
    text_dropout: float = 0.0  # a caption that is always the same needs no null of its own
    train_captions: bool = True  # whether the caption projection learns
    weight_decay: float = 0.03
    eps: float = 1e-10  # for gradients clipped to
    clip_norm: float = 0.01
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("prior_weight", "weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.text_dropout <= 1:
            raise ConfigError(f"text_dropout must be between 0 and 1, got {self.text_dropout}")


DREAMBOOTH = FinetuneSettings()
CONTROLNET = FinetuneSettings(steps=20_000, batch=12, text_dropout=0.1)
"""The paper's rate and steps; 3 images four times over, as in the released configuration."""
LCM_GUIDANCE = 4.5  # w of the teacher's guidance in the original code
LCM = FinetuneSettings(steps=5_000, batch=12, weight_decay=0.0, warmup_steps=100)
"""Of the original code at 1024 px, for one GPU; its rate is `lcm_lr`. The steps are our choice."""
LORA = FinetuneSettings(  # the optimiser of the original code's LoRA script, but for its rate
    lr=1e-4, train_captions=False, weight_decay=0.01, eps=1e-8, clip_norm=1.0
)


def lcm_lr(batch: int) -> float:
    """The original code's rate of a distillation: 2e-5 · √(batch / 256)."""
    return 2e-5 * math.sqrt(batch / 256)
