"""`pixart-rt finetune lcm`: a model into a student of a few steps, or an adapter that makes one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from pixart_rt.cli import finetune_options as given
from pixart_rt.cli.console import Steps
from pixart_rt.errors import ConfigError
from pixart_rt.files import check_source
from pixart_rt.training.finetune.settings import (
    DEFAULT_MODEL,
    LCM,
    LCM_ADAPTER,
    LCM_GUIDANCE,
    JobOptions,
    LoraSettings,
    LoraTargets,
    lcm_lr,
)


@given.with_job_options(ranks=True)
def lcm(
    data: given.Data,
    out: given.Out,
    model: given.Model = DEFAULT_MODEL,
    adapter: Annotated[
        bool, typer.Option("--lora", help="Train an adapter (LCM-LoRA), not all weights.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="With --lora; 32 by default.")] = None,
    alpha: given.Alpha = None,
    targets: Annotated[
        LoraTargets | None, typer.Option(help="With --lora: linears that get adapters.")
    ] = None,
    guidance_w: Annotated[
        float, typer.Option(help="The teacher's guidance_scale less 1.")
    ] = LCM_GUIDANCE,
    steps: given.Count = LCM.steps,
    lr: Annotated[
        float | None, typer.Option(help="Default: 2e-5 times the root of batch / 256.")
    ] = None,
    batch: given.StepBatch = LCM.batch,
    square: given.Square = False,
    *,
    options: JobOptions,
) -> None:
    """Distil a model into a student of 1 to 8 steps without guidance (LCM).

    OUT is a pipeline folder that `pixart-rt build` takes, its sampler lcm; with --lora an adapter,
    which `pixart-rt merge` makes such a folder of. A run that was stopped is resumed by the
    same command.

    \b
    Examples:
      pixart-rt finetune lcm features/ --out lcm
      pixart-rt finetune lcm features/ --lora --out lcm-lora
      pixart-rt finetune lcm images/ --model tiny --res 256 --out tiny-lcm --steps 100
    """
    settings = replace(LCM, steps=steps, batch=batch, lr=lcm_lr(batch) if lr is None else lr)
    chosen = _adapter(rank, alpha, targets, wanted=adapter)
    check_source(data, given.DATA)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.training.finetune.lcm import train_lcm  # torch: seconds
        from pixart_rt.training.process_group import is_first_rank

        train_lcm(
            data, out, model=model, adapter=chosen, guidance_w=guidance_w, square=square,
            settings=settings, options=options, progress=progress,
        )  # fmt: skip
    if is_first_rank():
        typer.echo(str(out))


def _adapter(
    rank: int | None, alpha: float | None, targets: LoraTargets | None, *, wanted: bool
) -> LoraSettings | None:
    """The settings of a requested adapter; ConfigError for some without it."""
    if not wanted:
        if any(value is not None for value in (rank, alpha, targets)):
            raise ConfigError(
                "--rank, --alpha and --targets are an adapter's; ask for one with --lora"
            )
        return None
    rank = LCM_ADAPTER.rank if rank is None else rank
    return LoraSettings(
        rank=rank,
        alpha=rank if alpha is None else alpha,
        targets=LCM_ADAPTER.targets if targets is None else targets,
    )
