"""A report printed before a run: effective rates, clipping, and where each setting is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from pixart_rt.training.optimizer_settings import SETTINGS, PhaseOptimizer, nearest
from pixart_rt.training.presets import PIXART_PARAMETERS, PRESETS, LrRule, Preset, Settings
from pixart_rt.training.recipe import Phase, Recipe
from pixart_rt.training.run_settings import OptimizerKind

HEADER = ("phase", "px", "steps", "preset", "batch", "lr", "warm-up steps", "positions /")
OPTIMIZER_HEADER = ("phase", "setting", "preset", "recipe", "effective")
UNSET = "-"


def report(
    recipe: Recipe,
    num_parameters: int = PIXART_PARAMETERS,
    *,
    batch: int | None = None,
    optimizer: OptimizerKind | None = None,
) -> list[str]:
    """Lines: the phases under both presets, the optimiser's settings, clip ratios, differences.

    The batch is that of all GPUs, the rate what a step gets, warm-up in steps of the optimiser.
    `batch` and `optimizer` are what the run takes instead of the recipe's.
    """
    absent = [phase.name for phase in recipe.phases if not phase.in_original_code]
    return [
        f"preset {recipe.preset}",
        *phase_table(recipe),
        *(
            f"{name} is not in the original code; its rule is applied all the same"
            for name in absent
        ),
        *optimizer_table(recipe, batch=batch, optimizer=optimizer),
        *_clip_ratios(recipe, num_parameters, batch, optimizer),
        "the presets differ in",
        *differences(),
    ]


def phase_table(recipe: Recipe) -> list[str]:
    """A header, and for each phase a row with either preset; columns aligned."""
    rows = [
        _row(replace(recipe, preset=name), phase) for phase in recipe.phases for name in PRESETS
    ]
    return _aligned([HEADER, *rows])


def optimizer_table(
    recipe: Recipe, *, batch: int | None = None, optimizer: OptimizerKind | None = None
) -> list[str]:
    """Each setting's preset, recipe's and effective value; one row where all phases agree."""
    rows: list[tuple[str, ...]] = [OPTIMIZER_HEADER]
    columns = [_values(recipe, phase, batch, optimizer) for phase in recipe.phases]
    for name in columns[0]:
        found = [values[name] for values in columns]
        if len(set(found)) == 1:
            rows.append(("all", name, *found[0]))
            continue
        rows += [
            (phase.name, name, *values) for phase, values in zip(recipe.phases, found, strict=True)
        ]
    return _aligned(rows)


def differences() -> list[str]:
    """A line for each setting in which the presets differ."""
    paper, code = PRESETS[Preset.PAPER], PRESETS[Preset.ORIGINAL_CODE]
    return [
        f"  {field.name}: {_plain(getattr(paper, field.name))} ({Preset.PAPER}), "
        f"{_plain(getattr(code, field.name))} ({Preset.ORIGINAL_CODE})"
        for field in fields(Settings)
        if getattr(paper, field.name) != getattr(code, field.name)
    ]


def _values(
    recipe: Recipe, phase: Phase, batch: int | None, kind: OptimizerKind | None
) -> dict[str, tuple[str, str, str]]:
    """(preset, recipe, effective) of every setting of a phase, as text."""
    preset, given = recipe.settings, nearest(recipe.optimizer, phase)
    effective = recipe.phase_optimizer(phase, batch=batch, kind=kind)
    rule = "as given" if preset.lr_rule is LrRule.CONSTANT else f"* sqrt(batch / {preset.lr_batch})"
    defaults: dict[str, object] = {
        "lr": rule,
        "weight_decay": preset.weight_decay,
        "betas": preset.betas,
        "eps": preset.eps,
        "clip_norm": preset.clip_norm,
        "warmup_steps": preset.effective_warmup(phase.num_gpus),
        "decay": 0.0,
    }
    values = {"kind": (str(OptimizerKind.ADAMW), str(recipe.optimizer.kind), str(effective.kind))}
    for name in SETTINGS:
        own = getattr(given, name)
        values[name] = (
            _plain(defaults[name]),
            UNSET if own is None else _plain(own),
            _plain(_effective(effective, name)),
        )
    return values


def _effective(optimizer: PhaseOptimizer, name: str) -> object:
    value = optimizer.warmup.steps if name == "warmup_steps" else getattr(optimizer, name)
    return f"{optimizer.kind}'s own" if value is None else value


def _clip_ratios(
    recipe: Recipe, num_parameters: int, batch: int | None, kind: OptimizerKind | None
) -> list[str]:
    """A line for each different clipping; CAME has no eps to compare with."""
    lines: dict[str, list[str]] = {}
    for phase in recipe.phases:
        optimizer = recipe.phase_optimizer(phase, batch=batch, kind=kind)
        if optimizer.eps is None:
            continue
        settings = replace(recipe.settings, clip_norm=optimizer.clip_norm, eps=optimizer.eps)
        line = (
            f"clip ratio {settings.clip_ratio(num_parameters):.3g}: clipping to a norm of "
            f"{settings.clip_norm:g} leaves {num_parameters} gradients an RMS of at most "
            f"{settings.clipped_rms(num_parameters):.3g}, and Adam's eps is {settings.eps:g}"
        )
        lines.setdefault(line, []).append(phase.name)
    if len(lines) <= 1:
        return list(lines)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _row(recipe: Recipe, phase: Phase) -> tuple[str, ...]:
    settings, optimizer = recipe.settings, recipe.phase_optimizer(phase)
    return (
        phase.name,
        str(phase.resolution),
        str(phase.steps),
        str(recipe.preset),
        str(phase.global_batch(settings)),
        f"{optimizer.lr:.3g}",
        f"{optimizer.warmup.steps:.3g}",
        f"{settings.interpolation_scale(phase.resolution):g}",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(_plain(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
