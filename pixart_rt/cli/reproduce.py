"""`pixart-rt reproduce`: the paper's claims, on the miniature."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_rt.cli.console import Steps, note
from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.files import check_into
from pixart_rt.training.ablation.arms import POINTS, Plan, planned, steps_within

reproduce = typer.Typer(
    name="reproduce",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Repeat what the paper reports, in miniature.",
)


@reproduce.callback()
def root() -> None:
    """Repeat what the paper reports, in miniature."""


@reproduce.command()
def ablation(
    out: Annotated[Path, typer.Option(help="The run's folder; a run there is resumed.")],
    minutes: Annotated[
        float | None,
        typer.Option(help="About how long all arms take; steps follow from a measurement."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of one unit instead; all arms take six units.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="64, 128 or 256 pixels.")] = None,
    captions: Annotated[int | None, typer.Option(help="Held-out captions of a score.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks of the models.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides all that is random.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
) -> None:
    """Re-parameterisation, adaLN-single, dense captions, decomposed training; with and without.

    Five models learn drawn scenes with equal steps, from equal starts. OUT gets a table and a
    picture for each claim; whatever they show. A run that was stopped is resumed by the same
    command. On a new folder give --minutes or --steps.

    \b
    Examples:
      pixart-rt reproduce ablation --out runs/ablation --minutes 120
      pixart-rt reproduce ablation --out runs/try --steps 40 --resolution 64 --layers 4
    """
    check_into(out)
    try:
        import matplotlib  # noqa: F401  # before hours of training, not after
    except ImportError as error:
        raise BackendError(
            "the ablation draws with matplotlib, which is missing; pip install 'pixart_rt[train]'"
        ) from error
    from pixart_rt.bench.provenance import provenance
    from pixart_rt.training.ablation.report import write
    from pixart_rt.training.ablation.run import Ablation, seconds_per_step
    from pixart_rt.training.ablation.shapes import costs
    from pixart_rt.training.process_group import start_ranks

    asked = {
        "resolution": resolution, "captions": captions, "num_layers": layers, "batch": batch,
        "steps": steps, "seed": seed,
    }  # fmt: skip
    with start_ranks(device) as ranks, Steps() as progress:

        def find_steps(known: dict[str, Any]) -> int:
            if minutes is None:
                raise ConfigError(f"{out} holds no ablation yet; give --minutes or --steps")
            shortest = Plan(steps=POINTS, **known)
            with tempfile.TemporaryDirectory() as folder:
                seconds = seconds_per_step(shortest, Path(folder), ranks)
            found = steps_within(60 * minutes, seconds, POINTS)
            note(f"a step takes {seconds:.3g} s here: {found} steps a unit, six units in all")
            return found

        plan = planned(out, {k: v for k, v in asked.items() if v is not None}, find_steps)
        ablation = Ablation(plan, out, ranks)
        curves = ablation.run(progress)
        measured = costs(ablation.config, ablation.some_batch())
    about = provenance(" ".join(["pixart-rt", *sys.argv[1:]]))
    for path in write(out, plan, curves, measured, about):
        typer.echo(str(path))
