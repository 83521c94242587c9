"""`pixart-rt plan`: predicted memory, and what fits a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixart_rt.buckets import RESOLUTIONS
from pixart_rt.cli.console import note, print_json, print_tables
from pixart_rt.config import LARGEST_BATCH, PUBLISHED, Precision
from pixart_rt.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from pixart_rt.memory.forecast import Forecast
    from pixart_rt.memory.tiers import Choice

_MIB, _GIB = 1 << 20, 1 << 30


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, xl-random, a published id, a diffusers folder or a bundle. Default: the "
            "published PixArt-alpha for --res."
        ),
    ] = None,
    res: Annotated[int, typer.Option(help="Pixels per side: 256, 512 or 1024.")] = 1024,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The card's memory, such as 8G or 8192M.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 1,
    precision: Annotated[
        Precision, typer.Option(help="Of all components, where nothing is quantized.")
    ] = Precision.BF16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict the peak memory of a pipeline in PyTorch on a GPU, and choose what fits.

    Reads configurations, never weights; published models need no files and no network. With --vram
    it names the best tier that fits, and fails where none does.

    \b
    Examples:
      pixart-rt plan --vram 8G
      pixart-rt plan --model tiny --res 256 --json
      pixart-rt plan --res 512 --batch 4 --vram 12G
    """
    if res not in RESOLUTIONS:
        known = ", ".join(str(each) for each in RESOLUTIONS)
        raise ConfigError(f"--res {res} was asked; choose one of {known}")
    if not 1 <= batch <= LARGEST_BATCH:
        raise ConfigError(f"--batch {batch} was asked; it is from 1 to {LARGEST_BATCH}")
    from pixart_rt.memory.forecast import Setting
    from pixart_rt.memory.shapes import find_shape
    from pixart_rt.memory.tiers import choices, choose, parse_bytes

    limit = None if vram is None else parse_bytes(vram)
    shape = find_shape(model or PUBLISHED[res], res)
    base = Setting(precision=precision, text_precision=precision, batch=batch)
    found = choices(shape, res, base, limit)
    if limit is None:
        chosen = None
    else:
        try:
            chosen = choose(found, limit)
        except CapacityError:
            if as_json:
                print_json(_record(shape.name, res, batch, limit, None, found))
            else:
                print_tables(*_tables(found[-1], found))
            raise
    if as_json:
        print_json(_record(shape.name, res, batch, limit, chosen, found))
        return
    print_tables(*_tables(chosen or found[0], found))
    if chosen is not None:
        typer.echo(_why(chosen, found))
    note("predicted, not measured; docs/memory.md says how well the two agree, and where")


def _record(
    model: str,
    res: int,
    batch: int,
    limit: int | None,
    chosen: Choice | None,
    found: list[Choice],
) -> dict[str, Any]:
    from pixart_rt.memory.tiers import RESERVE

    return {
        "model": model,
        "resolution": res,
        "batch": batch,
        "vram": limit,
        "reserve": RESERVE,
        "chosen": None if chosen is None else chosen.tier.name,
        "tiers": [
            {
                "name": choice.tier.name,
                "gives_up": choice.tier.gives_up,
                "fits": choice.fits,
                **forecast_record(choice.forecast),
            }
            for choice in found
        ],
    }


def forecast_record(forecast: Forecast) -> dict[str, Any]:
    """A forecast for JSON, in bytes."""
    return {
        "peak": forecast.peak,
        "peak_stage": forecast.peak_stage,
        "stages": forecast.stages,
        "null_prompt": forecast.null_prompt,
        "caches": forecast.caches,
        "components": {
            name: {
                "dtype": part.dtype,
                "weights": part.weights,
                "brought": part.brought,
                "activations": part.activations,
            }
            for name, part in forecast.parts.items()
        },
    }


def _tables(shown: Choice, found: list[Choice]) -> list[Any]:
    from rich.table import Table

    unit = "GiB" if found[0].forecast.peak >= _GIB else "MiB"

    def _size(size: int) -> str:
        return f"{size / (_GIB if unit == 'GiB' else _MIB):.2f}"

    parts = Table("component", "dtype", title=f"tier {shown.tier.name}, {unit}")
    for heading in ("weights", "while it runs", "activations"):
        parts.add_column(heading, justify="right")
    for name, part in shown.forecast.parts.items():
        sizes = (part.weights, part.brought, part.activations)
        parts.add_row(name, part.dtype, *(_size(size) for size in sizes))
    caches = shown.forecast.caches + shown.forecast.null_prompt
    parts.add_row("prompts and plans", "", _size(caches), _size(0), _size(0))
    tiers = Table(title=f"predicted peak by stage, {unit}")
    tiers.add_column("tier", no_wrap=True)
    for stage in shown.forecast.stages:
        tiers.add_column(stage, justify="right")
    for heading in ("peak", "fits"):
        tiers.add_column(heading, justify="right")
    tiers.add_column("gives up")
    for choice in found:
        fits = "" if choice.fits is None else "yes" if choice.fits else "no"
        stages = [_size(size) for size in choice.forecast.stages.values()]
        peak = _size(choice.forecast.peak)
        tiers.add_row(choice.tier.name, *stages, peak, fits, choice.tier.gives_up)
    return [parts, tiers]


def _why(chosen: Choice, found: list[Choice]) -> str:
    """The chosen tier in one sentence."""
    passed = [f"{c.tier.name} needs {_gib(c.forecast.peak)}" for c in found if not c.fits]
    before = passed[: found.index(chosen)]
    skipped = f"; passed over: {', '.join(before)}" if before else ""
    return (
        f"{chosen.tier.name}: peak {_gib(chosen.forecast.peak)} GiB while it "
        f"{chosen.forecast.peak_stage}s{skipped}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
