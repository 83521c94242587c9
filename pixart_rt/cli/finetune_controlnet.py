"""`pixart-rt finetune controlnet`: images and their edges into a ControlNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli import finetune_options as given
from pixart_rt.cli.console import Steps
from pixart_rt.files import check_source
from pixart_rt.model.controlnet_config import ControlVariant
from pixart_rt.training.finetune.settings import CONTROLNET, DEFAULT_MODEL, JobOptions


@given.with_job_options(ranks=True)
def controlnet(
    data: given.Data,
    out: given.Out,
    edges: Annotated[
        Path | None, typer.Argument(metavar="EDGES", help="With a store: the store of its edges.")
    ] = None,
    model: given.Model = DEFAULT_MODEL,
    condition: Annotated[
        str | None, typer.Option(help="With pictures: edges by canny, the default, or hed.")
    ] = None,
    variant: Annotated[
        ControlVariant, typer.Option(help="chained: as released; parallel: as in the paper.")
    ] = ControlVariant.CHAINED,
    copies: Annotated[
        int | None, typer.Option(help="Blocks copied. Default: 13 of 28; all if parallel.")
    ] = None,
    steps: given.Count = CONTROLNET.steps,
    lr: given.Rate = CONTROLNET.lr,
    batch: given.StepBatch = CONTROLNET.batch,
    text_dropout: given.TextDropout = CONTROLNET.text_dropout,
    square: given.Square = False,
    *,
    options: JobOptions,
) -> None:
    """Train a ControlNet on images and their edges.

    DATA and EDGES are stores of `pixart-rt data extract`, the second of what `pixart-rt data edges`
    drew; or DATA alone is a folder of pictures, whose edges are found while training. OUT holds the
    copied blocks; `pixart-rt build --controlnet OUT` takes it. A run that was stopped is resumed
    by the same command.

    \b
    Examples:
      pixart-rt finetune controlnet features/ edge-features/ --out hed
      pixart-rt finetune controlnet features-256/ edges-256/ --model tiny --res 256 --out hed \\
          --variant parallel --steps 100
      pixart-rt finetune controlnet images/ --condition canny --out canny
    """
    settings = replace(CONTROLNET, steps=steps, lr=lr, batch=batch, text_dropout=text_dropout)
    check_source(data, given.DATA)
    if edges is not None:
        check_source(edges, "the store of DATA's edges")
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.training.finetune.controlnet import ControlData, train_controlnet  # torch
        from pixart_rt.training.process_group import is_first_rank

        train_controlnet(
            ControlData(data=data, edges=edges, condition=condition, square=square),
            out, model=model, variant=variant, copies=copies, settings=settings, options=options,
            progress=progress,
        )  # fmt: skip
    if is_first_rank():
        typer.echo(str(out))
