"""The optimiser of a phase: a preset's defaults, the recipe's [optimizer] table, the phase's own.

    [optimizer]                     [[phases]]
    weight_decay = 0.01             name = "aesthetics-1024"
    betas = [0.9, 0.99]             clip_norm = 0.1             for this phase alone

The nearest setting counts: phase, table, preset. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.presets import Settings
from pixart_rt.training.run_settings import OptimizerKind

NUM_BETAS = {OptimizerKind.CAME: 3}  # the others have two


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseOverrides:
    """Settings of the optimiser that a recipe or a phase may set; None: not set."""

    lr: float | None = None  # before the preset's rule
    weight_decay: float | None = None
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    clip_norm: float | None = None  # of the gradients of all parameters together
    warmup_steps: float | None = None  # optimiser steps, the first of which has 1 / warmup_steps
    decay: float | None = None  # share of the steps, the last ones, in which the rate falls to 0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be > 0, got {value}")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be >= 0, got {value}")
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be between 0 and 1, got {self.decay}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {list(self.betas)}")


SETTINGS = tuple(field.name for field in fields(PhaseOverrides))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTable(PhaseOverrides):
    """The [optimizer] table of a recipe."""

    kind: OptimizerKind = OptimizerKind.ADAMW  # the paper's


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseOptimizer:
    """What a phase is optimised with. None: the optimiser's own."""

    kind: OptimizerKind
    lr: float
    weight_decay: float
    betas: tuple[float, ...] | None
    eps: float | None
    clip_norm: float
    warmup: Warmup
    decay: float


def nearest(table: OptimizerTable, phase: PhaseOverrides) -> PhaseOverrides:
    """The phase's settings, and the table's where it has none."""
    own = {name: getattr(phase, name) for name in SETTINGS}
    return PhaseOverrides(
        **{name: getattr(table, name) if own[name] is None else own[name] for name in SETTINGS}
    )


def phase_optimizer(
    preset: Settings, given: PhaseOverrides, kind: OptimizerKind, *, batch: int, num_gpus: int
) -> PhaseOptimizer:
    """The settings over the preset's, for steps of `batch` images.

    The preset's betas and eps are AdamW's; CAME has others of its own. `num_gpus` is what a
    preset's warm-up depends on. Raises ConfigError for settings that the optimiser cannot take.
    """
    if given.lr is None:
        raise ConfigError("no lr is set; give one in [optimizer] or in the phase")
    count = NUM_BETAS.get(kind, 2)
    if given.betas is not None and len(given.betas) != count:
        raise ConfigError(f"betas {list(given.betas)} are set, but {kind} takes {count}")
    if given.eps is not None and kind is OptimizerKind.CAME:
        raise ConfigError(f"eps {given.eps} is set, but {kind} has two of its own; leave it out")
    adam = kind is not OptimizerKind.CAME
    betas, eps = given.betas, given.eps
    return PhaseOptimizer(
        kind=kind,
        lr=preset.effective_lr(given.lr, batch),
        weight_decay=_or(given.weight_decay, preset.weight_decay),
        betas=preset.betas if betas is None and adam else betas,
        eps=preset.eps if eps is None and adam else eps,
        clip_norm=_or(given.clip_norm, preset.clip_norm),
        warmup=preset.warmup(num_gpus)
        if given.warmup_steps is None
        else Warmup(steps=given.warmup_steps),
        decay=_or(given.decay, 0.0),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
