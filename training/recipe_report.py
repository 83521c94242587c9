"""What a run will really do, printed before it starts: effective rates, clipping, both presets."""

from __future__ import annotations

from dataclasses import fields

from pixart_rt.training.presets import PIXART_PARAMETERS, PRESETS, Preset, Settings
from pixart_rt.training.recipe import Phase, Recipe

HEADER = ("phase", "px", "steps", "preset", "batch", "lr", "warm-up steps", "positions /")


def report(recipe: Recipe, num_parameters: int = PIXART_PARAMETERS) -> list[str]:
    """Lines: a table of the phases under both presets, the clip ratio, and the differences.

    The batch is that of all GPUs, the rate what a step gets, warm-up in steps of the optimiser.
    """
    settings = recipe.settings
    absent = [phase.name for phase in recipe.phases if not phase.in_original_code]
    lines = [
        f"preset {recipe.preset}",
        *phase_table(recipe),
        *(f"{name} is not in the original code; its rule is applied all the same"
          for name in absent),
        f"clip ratio {settings.clip_ratio(num_parameters):.3g}: clipping to a norm of "
        f"{settings.clip_norm:g} leaves {num_parameters} gradients an RMS of at most "
        f"{settings.clipped_rms(num_parameters):.3g}, and Adam's eps is {settings.eps:g}",
    ]  # fmt: skip
    return [*lines, "the presets differ in", *differences()]


def phase_table(recipe: Recipe) -> list[str]:
    """A header, and for each phase a row with either preset; columns aligned."""
    rows: list[tuple[str, ...]] = [HEADER]
    rows += [_row(phase, name, each) for phase in recipe.phases for name, each in PRESETS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def differences() -> list[str]:
    """A line for each setting in which the presets differ."""
    paper, code = PRESETS[Preset.PAPER], PRESETS[Preset.ORIGINAL_CODE]
    return [
        f"  {field.name}: {_plain(getattr(paper, field.name))} ({Preset.PAPER}), "
        f"{_plain(getattr(code, field.name))} ({Preset.ORIGINAL_CODE})"
        for field in fields(Settings)
        if getattr(paper, field.name) != getattr(code, field.name)
    ]


def _row(phase: Phase, preset: Preset, settings: Settings) -> tuple[str, ...]:
    return (
        phase.name,
        str(phase.resolution),
        str(phase.steps),
        str(preset),
        str(phase.global_batch(settings)),
        f"{phase.effective_lr(settings):.3g}",
        f"{phase.warmup(settings).steps:.3g}",
        f"{settings.interpolation_scale(phase.resolution):g}",
    )


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
