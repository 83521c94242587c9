"""The settings of fine-tuning: DreamBooth (paper, Section A.9), LoRA, LCM, ControlNet.

Imports no torch. What the original code has where it differs:
- its DreamBooth runs 200 epochs, not 300 steps, and still drops one caption in ten;
- its LoRA script has rank 4, alpha 8 (peft's default), a rate of 1e-6, and adapts the linears
  outside the blocks too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pixart_rt.config import Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel

DEFAULT_MODEL = "PixArt-alpha/PixArt-XL-2-1024-MS"


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
                raise ConfigError(f"`{name}` of a LoRA must be > 0, got {getattr(self, name)}")


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
                raise ConfigError(f"`{name}` must be > 0, got {getattr(self, name)}")
        for name in ("prior_weight", "weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`{name}` must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.text_dropout <= 1:
            raise ConfigError(f"`text_dropout` must be between 0 and 1, got {self.text_dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """The options of every fine-tuning besides what it learns: where and how it is computed."""

    res: int | None = None  # pixels that the model must be for; 256 takes tiny's model for that
    seed: int = 0  # decides all that is random
    device: str | None = None  # "cuda" or "cpu"; None: a GPU if there is one
    precision: Precision | None = None  # of matrix products; None: the device's
    optimizer: OptimizerKind = OptimizerKind.ADAMW
    checkpointing: Checkpointing = Checkpointing.NONE
    parallel: Parallel = Parallel.DDP
    micro_batches: int | None = None  # parts of a step, over all ranks; None: one a rank
    workers: int = 2  # processes that read data, for each rank
    force: bool = False  # replace what is at `out`, if we wrote it

    def __post_init__(self) -> None:
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ConfigError(f"`micro_batches` must be > 0, got {self.micro_batches}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` must be >= 0, got {getattr(self, name)}")


def lcm_lr(batch: int) -> float:
    """The original code's rate of a distillation: 2e-5 · √(batch / 256)."""
    if batch < 1:
        raise ConfigError(f"`batch` must be > 0, got {batch}")
    return 2e-5 * math.sqrt(batch / 256)


DEFAULT_OPTIONS = JobOptions()
DEFAULT_ADAPTER = LoraSettings()
DREAMBOOTH = FinetuneSettings()
LORA = FinetuneSettings(  # the optimiser of the original code's LoRA script, but for its rate
    lr=1e-4, train_captions=False, weight_decay=0.01, eps=1e-8, clip_norm=1.0
)
CONTROLNET = FinetuneSettings(steps=20_000, batch=12, text_dropout=0.1)
"""The paper's rate and steps; 3 images four times over, as in the released configuration."""
LCM = FinetuneSettings(steps=5_000, batch=12, lr=lcm_lr(12), weight_decay=0.0, warmup_steps=100)
"""Of the original code at 1024 px, for one GPU. The steps are our choice."""
LCM_ADAPTER = LoraSettings(rank=32, alpha=32.0)
LCM_GUIDANCE = 4.5  # w of the teacher's guidance in the original code
