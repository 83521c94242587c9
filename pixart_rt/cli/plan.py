"""`pixart-rt plan`: predicted memory, and what fits a card."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixart_rt.buckets import RESOLUTIONS
from pixart_rt.cli.console import note, print_json, print_tables
from pixart_rt.config import LARGEST_BATCH, PUBLISHED, EngineConfig, Precision
from pixart_rt.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from pixart_rt.memory.forecast import Forecast
    from pixart_rt.memory.models import Model
    from pixart_rt.memory.tiers import Tier

_MIB, _GIB = 1 << 20, 1 << 30


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, xl-random, a published id, a diffusers folder or a bundle. Default: the "
            "published PixArt-alpha for --res."
        ),
    ] = None,
    res: Annotated[
        int | None,
        typer.Option(help="Pixels per side: 256, 512 or 1024. Default: a bundle's own, or 1024."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The card's memory, such as 8G or 8192M.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 1,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of all components, where nothing is quantized. Default: bf16; a bundle has its "
            "own."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict the peak memory of a model in PyTorch or of a bundle, and choose what fits.

    Reads configurations and, of a bundle, the peaks that its build measured, never weights;
    published models need no files and no network. With --vram it names the best tier that fits,
    and fails where none does.

    \b
    Examples:
      pixart-rt plan --vram 8G
      pixart-rt plan --model tiny --res 256 --json
      pixart-rt plan --res 512 --batch 4 --vram 12G
      pixart-rt plan --model engines/tiny-1024 --vram 2G
    """
    if res is not None and res not in RESOLUTIONS:
        known = ", ".join(str(each) for each in RESOLUTIONS)
        raise ConfigError(f"--res {res} is not supported; choose one of {known}")
    if not 1 <= batch <= LARGEST_BATCH:
        raise ConfigError(f"--batch {batch} is not supported; it is from 1 to {LARGEST_BATCH}")
    from pixart_rt.memory.models import find_model
    from pixart_rt.memory.tiers import choose, parse_bytes, tiers

    limit = None if vram is None else parse_bytes(vram)
    found_model = find_model(model or PUBLISHED[res or 1024], res)
    found = tiers(found_model, _config(found_model, batch, precision))
    name, res, chosen = found_model.name, found_model.config.resolution, None
    if limit is not None:
        try:
            chosen = choose(found, limit)
        except CapacityError:
            if as_json:
                print_json(_record(name, res, batch, limit, None, found))
            else:
                print_tables(*_tables(found[-1], found, limit))
            raise
    if as_json:
        print_json(_record(name, res, batch, limit, chosen, found))
        return
    print_tables(*_tables(chosen or found[0], found, limit))
    if chosen is not None:
        typer.echo(_why(chosen, found))
    note("predicted, not measured; docs/memory.md says how well the two agree, and where")


def _config(model: Model, batch: int, precision: Precision | None) -> EngineConfig:
    """The bundle's own, or a build in PyTorch."""
    if model.built is None:
        usual = precision or Precision.BF16
        return EngineConfig(
            resolution=model.config.resolution,
            backend="torch",
            precision=usual,
            text_precision=usual,
            max_batch=batch,
        )
    if precision is not None:
        raise ConfigError(
            f"--precision {precision} was requested of the bundle {model.name}, which is built in "
            f"{model.built.precision}; leave it out"
        )
    if batch > model.built.max_batch:
        raise ConfigError(
            f"--batch {batch} was requested of the bundle {model.name}, which runs at most "
            f"{model.built.max_batch} at once; ask for fewer, or build with --max-batch {batch}"
        )
    return replace(model.built, max_batch=batch)


def _record(
    model: str,
    res: int,
    batch: int,
    limit: int | None,
    chosen: Tier | None,
    found: list[Tier],
) -> dict[str, Any]:
    from pixart_rt.memory.tiers import RESERVE

    return {
        "model": model,
        "resolution": res,
        "batch": batch,
        "vram": limit,
        "reserve": RESERVE,
        "chosen": None if chosen is None else chosen.name,
        "tiers": [
            {
                "name": tier.name,
                "gives_up": tier.gives_up,
                "fits": None if limit is None else tier.fits(limit),
                **forecast_record(tier.forecast),
            }
            for tier in found
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


def _tables(shown: Tier, found: list[Tier], limit: int | None) -> list[Any]:
    from rich.table import Table

    unit = "GiB" if found[0].forecast.peak >= _GIB else "MiB"

    def _size(size: int) -> str:
        return f"{size / (_GIB if unit == 'GiB' else _MIB):.2f}"

    parts = Table("component", "dtype", title=f"tier {shown.name}, {unit}")
    for heading in ("weights", "while it runs", "activations"):
        parts.add_column(heading, justify="right")
    for name, part in shown.forecast.parts.items():
        sizes = (part.weights, part.brought, part.activations)
        parts.add_row(name, part.dtype, *(_size(size) for size in sizes))
    caches = shown.forecast.caches + shown.forecast.null_prompt
    parts.add_row("prompts and plans", "", _size(caches), _size(0), _size(0))
    table = Table(title=f"predicted peak by stage, {unit}")
    table.add_column("tier", no_wrap=True)
    for stage in shown.forecast.stages:
        table.add_column(stage, justify="right")
    for heading in ("peak",) if limit is None else ("peak", "fits"):
        table.add_column(heading, justify="right")
    for tier in found:
        fits = [] if limit is None else ["yes" if tier.fits(limit) else "no"]
        stages = [_size(size) for size in tier.forecast.stages.values()]
        table.add_row(tier.name, *stages, _size(tier.forecast.peak), *fits)
    costs = Table("tier", "gives up")
    for tier in found:
        costs.add_row(tier.name, tier.gives_up)
    return [parts, table, costs]


def _why(chosen: Tier, found: list[Tier]) -> str:
    """The chosen tier in one sentence."""
    before = found[: found.index(chosen)]
    passed = ", ".join(f"{tier.name} needs {_gib(tier.forecast.peak)}" for tier in before)
    skipped = f"; passed over: {passed}" if passed else ""
    return (
        f"{chosen.name}: peak {_gib(chosen.forecast.peak)} GiB while it "
        f"{chosen.forecast.peak_stage}s{skipped}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
