"""How a phase is run: what the optimiser does, in which precision, over how many ranks.

Imports no torch. A recipe's phase gives most of it (phases.py); the rest is run_options.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pixart_rt.config import Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.warmup import Warmup, cosine_end


class OptimizerKind(StrEnum):
    """What moves the weights (optimizers.py)."""

    ADAMW = "adamw"
    """PyTorch's, fused: one kernel for all parameters. What the paper trains with (A.5)."""
    ADAMW_8BIT = "adamw8bit"
    """torchao's, with moments of 8 bits; the host waits for the device once a step."""
    CAME = "came"
    """Factored second moment (arXiv:2307.02047), as PixArt-Sigma trains."""
    MUON = "muon"
    """Orthogonalized steps for the blocks' matrices, AdamW for the rest (muon.py); DDP only."""


class Parallel(StrEnum):
    """How ranks share the work; all of them compute the same step."""

    DDP = "ddp"
    """Every rank has the whole model and its states."""
    FSDP = "fsdp"
    """Weights, gradients and states divided over all ranks, gathered block by block."""
    HSDP = "hsdp"
    """Divided over the ranks of a node, repeated on every node."""


class Checkpointing(StrEnum):
    """What a block keeps for its backward."""

    NONE = "none"
    SELECTIVE = "selective"
    """Matrix products and attention; the rest is run again (kernels/checkpointing.py)."""
    FULL = "full"
    """Its inputs; all of it is run again."""


class Place(StrEnum):
    """Where log lines can go (log_writers.py)."""

    CONSOLE = "console"
    JSONL = "jsonl"
    TENSORBOARD = "tensorboard"
    """Needs the extra `tensorboard`."""
    WANDB = "wandb"
    """Weights & Biases; needs its package and its own login."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """One phase of training. Counts are of optimiser steps, from 0."""

    steps: int
    lr: float  # after a preset's rule: what a step gets once the warm-up is over
    warmup: Warmup = field(default_factory=Warmup)
    decay: float = 0.0  # share of the steps, the last ones, in which the rate falls to zero
    optimizer: OptimizerKind = OptimizerKind.ADAMW
    weight_decay: float = 0.03
    betas: tuple[float, ...] | None = None  # None: the optimiser's own
    eps: float | None = None
    clip_norm: float = 1.0
    ema_decay: float | None = 0.9999  # None: no average is kept
    ema_on_cpu: bool = False
    precision: Precision = Precision.BF16  # of autocast; weights and states stay float32
    micro_batches: int = 1  # of a step, over all ranks; each rank runs its share one by one
    parallel: Parallel = Parallel.DDP
    reproducible: bool = False
    """The same bits with any number of ranks that is a power of two: gradients of micro-batches are
    added in a fixed tree. Costs gradient copies and, over R ranks, R times the traffic."""
    compile: bool = False  # the blocks, by torch.compile
    checkpointing: Checkpointing = Checkpointing.NONE
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3  # checkpoints; older ones are removed
    validate_every: int | None = None
    profile_every: int | None = None  # steps, a multiple of log_every; on GPUs

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "clip_norm", "micro_batches", "log_every", "save_every",
                     "keep"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("validate_every", "profile_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.profile_every is not None and self.profile_every % self.log_every:
            raise ConfigError(
                f"profile_every {self.profile_every} is not supported with a log line every "
                f"{self.log_every} steps; use a multiple, so that a line reports what was profiled"
            )
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be between 0 and 1, got {self.decay}")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        if self.reproducible and self.parallel is not Parallel.DDP:
            raise ConfigError(
                f"reproducible is not supported with {self.parallel}, whose sums have an order of "
                f"their own; use {Parallel.DDP}"
            )
        if self.reproducible and self.micro_batches & (self.micro_batches - 1):
            raise ConfigError(
                f"reproducible is not supported with {self.micro_batches} micro-batches, which do "
                "not pair up in a tree; use a power of two"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * self.warmup.share(step) * cosine_end(step, self.steps, self.decay)

    def identity(self) -> dict[str, object]:
        """What must not change when a run is resumed: samples, their draws and how it learns."""
        return {
            "seed": self.seed,
            "micro_batches": self.micro_batches,
            "optimizer": str(self.optimizer),
            "precision": str(self.precision),
            "lr": self.lr,
            "warmup": [self.warmup.steps, self.warmup.from_zero],
            "decay": [self.decay, self.steps] if self.decay else None,
            "weight_decay": self.weight_decay,
            "betas": None if self.betas is None else list(self.betas),
            "eps": self.eps,
            "clip_norm": self.clip_norm,
            "ema_decay": self.ema_decay,
        }
