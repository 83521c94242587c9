"""`pixart-rt finetune lora` and `dreambooth`: a few pictures into an adapter or all weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from pixart_rt.cli import finetune_options as given
from pixart_rt.cli.console import Steps
from pixart_rt.training.finetune.settings import (
    DEFAULT_ADAPTER,
    DEFAULT_MODEL,
    DREAMBOOTH,
    LORA,
    JobOptions,
    LoraSettings,
)


@given.with_job_options(ranks=False)
def lora(
    images: given.Images,
    out: given.Out,
    model: given.Model = DEFAULT_MODEL,
    prompt: given.Prompt = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = DEFAULT_ADAPTER.rank,
    alpha: given.Alpha = None,
    targets: given.Targets = DEFAULT_ADAPTER.targets,
    class_images: given.ClassImages = None,
    class_prompt: given.ClassPrompt = None,
    prior_weight: given.PriorWeight = LORA.prior_weight,
    steps: given.Count = LORA.steps,
    lr: given.Rate = LORA.lr,
    batch: given.Batch = LORA.batch,
    text_dropout: given.TextDropout = LORA.text_dropout,
    square: given.Square = False,
    *,
    options: JobOptions,
) -> None:
    """Train a LoRA adapter, for a subject or a style.

    OUT is in peft's format for diffusers' transformer; `pixart-rt merge` puts it into weights. A
    run that was stopped is resumed by the same command.

    \b
    Examples:
      pixart-rt finetune lora dog/ --prompt "a photo of sks dog" --out dog-lora
      pixart-rt finetune lora sketches/ --model tiny --out style --rank 8 --steps 1000
      pixart-rt finetune lora dog/ --prompt "a photo of sks dog" --out dog-lora \\
          --class-images dogs/ --class-prompt "a photo of a dog"
    """
    settings = replace(LORA, steps=steps, lr=lr, batch=batch, prior_weight=prior_weight,
                       text_dropout=text_dropout)  # fmt: skip
    adapter = LoraSettings(rank=rank, alpha=rank if alpha is None else alpha, targets=targets)
    given.check_pictures(images, class_images)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.training.finetune.few_pictures import Pictures  # torch, peft: seconds
        from pixart_rt.training.finetune.lora import train_lora
        from pixart_rt.training.process_group import is_first_rank

        train_lora(
            Pictures(images=images, prompt=prompt, class_images=class_images,
                     class_prompt=class_prompt, square=square),
            out, model=model, adapter=adapter, settings=settings, options=options,
            progress=progress,
        )  # fmt: skip
    if is_first_rank():
        typer.echo(str(out))


@given.with_job_options(ranks=False)
def dreambooth(
    images: given.Images,
    out: given.Out,
    model: given.Model = DEFAULT_MODEL,
    prompt: given.Prompt = None,
    freeze_captions: Annotated[
        bool, typer.Option("--freeze-captions", help="Do not train the caption projection.")
    ] = False,
    class_images: given.ClassImages = None,
    class_prompt: given.ClassPrompt = None,
    prior_weight: given.PriorWeight = DREAMBOOTH.prior_weight,
    steps: given.Count = DREAMBOOTH.steps,
    lr: given.Rate = DREAMBOOTH.lr,
    batch: given.Batch = DREAMBOOTH.batch,
    text_dropout: given.TextDropout = DREAMBOOTH.text_dropout,
    square: given.Square = False,
    *,
    options: JobOptions,
) -> None:
    """Train all weights on a few pictures of a subject.

    OUT is a pipeline folder as --model is, which `pixart-rt build` takes. A run that was stopped
    is resumed by the same command.

    \b
    Examples:
      pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model
      pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model \\
          --optimizer came --checkpointing full
    """
    settings = replace(DREAMBOOTH, steps=steps, lr=lr, batch=batch, prior_weight=prior_weight,
                       text_dropout=text_dropout, train_captions=not freeze_captions)  # fmt: skip
    given.check_pictures(images, class_images)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.training.finetune.dreambooth import train_dreambooth  # torch: seconds
        from pixart_rt.training.finetune.few_pictures import Pictures
        from pixart_rt.training.process_group import is_first_rank

        train_dreambooth(
            Pictures(images=images, prompt=prompt, class_images=class_images,
                     class_prompt=class_prompt, square=square),
            out, model=model, settings=settings, options=options, progress=progress,
        )  # fmt: skip
    if is_first_rank():
        typer.echo(str(out))
