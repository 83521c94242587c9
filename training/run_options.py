"""The options of a run besides its recipe, shared by `train` (run.py) and `pixart-rt train`.

    TrainOptions(overrides=Overrides(batch=64), compute=Compute(compile=True))

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pixart_rt.config import Kernels, Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """Values that replace the recipe's in every phase of this run; None keeps the recipe's."""

    steps: int | None = None
    batch: int | None = None  # images of a step, over all ranks
    micro_batches: int | None = None  # parts of a step, over all ranks
    optimizer: OptimizerKind | None = None

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "batch", "micro_batches")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a step is computed, and where. None is the device's default (device_defaults.py)."""

    device: str | None = None  # "cuda" or "cpu"; None: a GPU if there is one
    precision: Precision | None = None  # of matrix products; None: the recipe's, then the device's
    kernels: Kernels | None = None
    parallel: Parallel = Parallel.DDP
    reproducible: bool = False  # the same bits on 1, 2, 4... ranks
    compile: bool = False
    checkpointing: Checkpointing = Checkpointing.NONE
    ema_on_cpu: bool = False
    workers: int = 2  # processes that read data, for each rank

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"`workers` must be >= 0, got {self.workers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """What a run writes while it trains; counts are of optimiser steps."""

    log: Collection[str] = (Place.CONSOLE, Place.JSONL)
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3  # checkpoints; older ones are removed
    profile_every: int | None = None

    def __post_init__(self) -> None:
        _check_counts(self, "log_every", "save_every", "keep", "profile_every")
        unknown = sorted(set(self.log) - set(Place))
        if unknown:
            raise ConfigError(
                f"`log={unknown[0]}` is not supported; choose from {', '.join(Place)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationImages:
    """Images drawn in text phases, with the encoder, VAE and sampler of `model`."""

    model: str
    every: int  # steps
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"`validate_every` must be > 0, got {self.every}")
        if not self.prompts:
            raise ConfigError(
                "validation images were requested without a prompt; give at least one"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """All of the above. The seed decides all that is random."""

    overrides: Overrides = field(default_factory=Overrides)
    compute: Compute = field(default_factory=Compute)
    records: Records = field(default_factory=Records)
    validation: ValidationImages | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"`seed` must be >= 0, got {self.seed}")


def _check_counts(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be > 0, got {value}")


DEFAULT_OPTIONS = TrainOptions()
