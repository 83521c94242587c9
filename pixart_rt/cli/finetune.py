"""`pixart-rt finetune`: pictures into a LoRA or all weights, an LCM student, a ControlNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli.console import Steps
from pixart_rt.cli.finetune_options import (
    DEFAULT_MODEL,
    Alpha,
    Batch,
    ClassImages,
    ClassPrompt,
    Count,
    Device,
    Floats,
    Force,
    Images,
    MicroBatches,
    Model,
    Optimizer,
    Out,
    PriorWeight,
    Prompt,
    Rate,
    Recompute,
    Res,
    Seed,
    Share,
    Square,
    Targets,
    TextDropout,
    Workers,
    check_outputs,
)
from pixart_rt.config import Precision
from pixart_rt.errors import ConfigError
from pixart_rt.files import ADAPTER, PIPELINE, TRANSFORMER
from pixart_rt.files import CONTROLNET as CONTROLNET_FOLDER
from pixart_rt.model.controlnet_config import ControlVariant
from pixart_rt.training.finetune.settings import (
    CONTROLNET,
    DREAMBOOTH,
    LCM,
    LCM_GUIDANCE,
    LORA,
    FinetuneSettings,
    LoraSettings,
    LoraTargets,
    lcm_lr,
)
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel

finetune = typer.Typer(
    name="finetune",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Adapt a model to pictures.\n\n\b\nExamples:\n"
    '  pixart-rt finetune lora dog/ --model tiny --prompt "a photo of sks dog" --out dog-lora\n'
    '  pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model',
)

_RANK = LoraSettings()


@finetune.command()
def lora(
    images: Images,
    out: Out,
    model: Model = DEFAULT_MODEL,
    prompt: Prompt = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = _RANK.rank,
    alpha: Alpha = None,
    targets: Targets = _RANK.targets,
    class_images: ClassImages = None,
    class_prompt: ClassPrompt = None,
    prior_weight: PriorWeight = LORA.prior_weight,
    steps: Count = LORA.steps,
    lr: Rate = LORA.lr,
    batch: Batch = LORA.batch,
    text_dropout: TextDropout = LORA.text_dropout,
    res: Res = None,
    square: Square = False,
    seed: Seed = 0,
    device: Device = None,
    precision: Floats = None,
    optimizer: Optimizer = OptimizerKind.ADAMW,
    checkpointing: Recompute = Checkpointing.NONE,
    micro_batches: MicroBatches = None,
    force: Force = False,
) -> None:
    """Train a LoRA adapter, for a subject or a style.

    OUT is in peft's format for diffusers' transformer; `pixart-rt merge` puts it into weights. A
    run that was stopped goes on with the same command.

    \b
    Examples:
      pixart-rt finetune lora dog/ --prompt "a photo of sks dog" --out dog-lora
      pixart-rt finetune lora sketches/ --model tiny --out style --rank 8 --steps 1000
      pixart-rt finetune lora dog/ --prompt "a photo of sks dog" --out dog-lora \\
          --class-images dogs/ --class-prompt "a photo of a dog"
    """
    _run(
        images, model, out, prompt, class_images, class_prompt,
        replace(LORA, steps=steps, lr=lr, batch=batch, prior_weight=prior_weight,
                text_dropout=text_dropout),
        LoraSettings(rank=rank, alpha=rank if alpha is None else alpha, targets=targets),
        res, square, seed, device, precision, optimizer, checkpointing, micro_batches, force,
    )  # fmt: skip


@finetune.command()
def dreambooth(
    images: Images,
    out: Out,
    model: Model = DEFAULT_MODEL,
    prompt: Prompt = None,
    freeze_captions: Annotated[
        bool, typer.Option("--freeze-captions", help="Do not train the caption projection.")
    ] = False,
    class_images: ClassImages = None,
    class_prompt: ClassPrompt = None,
    prior_weight: PriorWeight = DREAMBOOTH.prior_weight,
    steps: Count = DREAMBOOTH.steps,
    lr: Rate = DREAMBOOTH.lr,
    batch: Batch = DREAMBOOTH.batch,
    text_dropout: TextDropout = DREAMBOOTH.text_dropout,
    res: Res = None,
    square: Square = False,
    seed: Seed = 0,
    device: Device = None,
    precision: Floats = None,
    optimizer: Optimizer = OptimizerKind.ADAMW,
    checkpointing: Recompute = Checkpointing.NONE,
    micro_batches: MicroBatches = None,
    force: Force = False,
) -> None:
    """Train all weights on a few pictures of a subject.

    OUT is a pipeline folder as --model is, which `pixart-rt build` takes. A run that was stopped
    goes on with the same command.

    \b
    Examples:
      pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model
      pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model \\
          --optimizer came --checkpointing full
    """
    _run(
        images, model, out, prompt, class_images, class_prompt,
        replace(DREAMBOOTH, steps=steps, lr=lr, batch=batch, prior_weight=prior_weight,
                text_dropout=text_dropout, train_captions=not freeze_captions),
        None,
        res, square, seed, device, precision, optimizer, checkpointing, micro_batches, force,
    )  # fmt: skip


@finetune.command()
def lcm(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A feature store, or pictures with captions.")
    ],
    out: Out,
    model: Model = DEFAULT_MODEL,
    adapter: Annotated[
        bool, typer.Option("--lora", help="Train an adapter (LCM-LoRA), not all weights.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="With --lora; 32 by default.")] = None,
    alpha: Alpha = None,
    targets: Annotated[
        LoraTargets | None, typer.Option(help="With --lora: linears that get adapters.")
    ] = None,
    guidance_w: Annotated[
        float, typer.Option(help="The teacher's guidance_scale less 1.")
    ] = LCM_GUIDANCE,
    steps: Count = LCM.steps,
    lr: Annotated[
        float | None, typer.Option(help="Default: 2e-5 times the root of batch / 256.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = LCM.batch,
    res: Res = None,
    square: Square = False,
    seed: Seed = 0,
    device: Device = None,
    precision: Floats = None,
    optimizer: Optimizer = OptimizerKind.ADAMW,
    checkpointing: Recompute = Checkpointing.NONE,
    parallel: Share = Parallel.DDP,
    micro_batches: MicroBatches = None,
    workers: Workers = 2,
    force: Force = False,
) -> None:
    """Distil a model into a student of 1 to 8 steps without guidance (LCM).

    OUT is a pipeline folder that `pixart-rt build` takes, its sampler lcm; with --lora an adapter,
    which `pixart-rt merge` makes such a folder of. A run that was stopped goes on with the same
    command.

    \b
    Examples:
      pixart-rt finetune lcm features/ --out lcm
      pixart-rt finetune lcm features/ --lora --out lcm-lora
      pixart-rt finetune lcm images/ --model tiny --res 256 --out tiny-lcm --steps 100
    """
    if not adapter and any(each is not None for each in (rank, alpha, targets)):
        raise ConfigError("--rank, --alpha and --targets are an adapter's; ask for one with --lora")
    if batch < 1:
        raise ConfigError(f"batch must be > 0, got {batch}")
    check_outputs(out, ADAPTER if adapter else PIPELINE, force=force)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.cli import lcm_training  # torch: seconds
        from pixart_rt.cli.training_job import Job
        from pixart_rt.training.objectives.lcm import FULL
        from pixart_rt.training.objectives.lcm import LORA as LCM_LORA

        settings, lora = replace(FULL, guidance_w=guidance_w), None
        if adapter:
            chosen = LCM_LORA.lora_rank if rank is None else rank
            assert chosen is not None
            settings = replace(LCM_LORA, guidance_w=guidance_w, lora_rank=chosen)
            lora = LoraSettings(rank=chosen, alpha=chosen if alpha is None else alpha,
                                targets=targets or _RANK.targets)  # fmt: skip
        request = lcm_training.LcmRequest(
            job=Job(
                model=model, out=out, res=res, seed=seed, device=device, precision=precision,
                settings=replace(LCM, steps=steps, batch=batch,
                                 lr=lcm_lr(batch) if lr is None else lr),
                optimizer=optimizer, checkpointing=checkpointing, parallel=parallel,
                micro_batches=micro_batches, force=force,
            ),
            data=data, lcm=settings, lora=lora, square=square, workers=workers,
        )  # fmt: skip
        tells = lcm_training.distil(request, progress)
    if tells:
        typer.echo(str(out))


@finetune.command()
def controlnet(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A feature store, or pictures with captions.")
    ],
    out: Out,
    edges: Annotated[
        Path | None, typer.Argument(metavar="EDGES", help="With a store: the store of its edges.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    condition: Annotated[
        str | None, typer.Option(help="With pictures: edges by canny, the default, or hed.")
    ] = None,
    variant: Annotated[
        ControlVariant, typer.Option(help="chained: as released; parallel: as in the paper.")
    ] = ControlVariant.CHAINED,
    copies: Annotated[
        int | None, typer.Option(help="Blocks copied. Default: 13 of 28; all if parallel.")
    ] = None,
    steps: Count = CONTROLNET.steps,
    lr: Rate = CONTROLNET.lr,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = CONTROLNET.batch,
    text_dropout: TextDropout = CONTROLNET.text_dropout,
    res: Res = None,
    square: Square = False,
    seed: Seed = 0,
    device: Device = None,
    precision: Floats = None,
    optimizer: Optimizer = OptimizerKind.ADAMW,
    checkpointing: Recompute = Checkpointing.NONE,
    parallel: Share = Parallel.DDP,
    micro_batches: MicroBatches = None,
    workers: Workers = 2,
    force: Force = False,
) -> None:
    """Train a ControlNet on images and their edges.

    DATA and EDGES are stores of `pixart-rt data extract`, the second of what `pixart-rt data edges`
    drew; or DATA alone is a folder of pictures, whose edges are found while training. OUT holds the
    copied blocks; `pixart-rt build --controlnet OUT` takes it. A run that was stopped goes on with
    the same command.

    \b
    Examples:
      pixart-rt finetune controlnet features/ edge-features/ --out hed
      pixart-rt finetune controlnet features-256/ edges-256/ --model tiny --res 256 --out hed \\
          --variant parallel --steps 100
      pixart-rt finetune controlnet images/ --condition canny --out canny
    """
    check_outputs(out, CONTROLNET_FOLDER, force=force)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.cli import control_training  # torch: seconds
        from pixart_rt.cli.training_job import Job
        from pixart_rt.data.edges import EdgeKind

        if condition is not None and condition not in list(EdgeKind):
            raise ConfigError(
                f"--condition {condition} was asked; choose one of {', '.join(EdgeKind)}"
            )
        request = control_training.ControlRequest(
            job=Job(
                model=model, out=out, res=res, seed=seed, device=device, precision=precision,
                settings=replace(CONTROLNET, steps=steps, lr=lr, batch=batch,
                                 text_dropout=text_dropout),
                optimizer=optimizer, checkpointing=checkpointing, parallel=parallel,
                micro_batches=micro_batches, force=force,
            ),
            data=data, edges=edges, variant=variant, num_copies=copies, square=square,
            condition=None if condition is None else EdgeKind(condition), workers=workers,
        )  # fmt: skip
        tells = control_training.train_controlnet(request, progress)
    if tells:
        typer.echo(str(out))


def _run(
    images: Path,
    model: str,
    out: Path,
    prompt: str | None,
    class_images: Path | None,
    class_prompt: str | None,
    settings: FinetuneSettings,
    adapter: LoraSettings | None,
    res: int | None,
    square: bool,
    seed: int,
    device: str | None,
    precision: Precision | None,
    optimizer: OptimizerKind,
    checkpointing: Checkpointing,
    micro_batches: int | None,
    force: bool,
) -> None:
    check_outputs(out, (PIPELINE, TRANSFORMER) if adapter is None else ADAPTER, force=force)
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.cli import finetuning  # torch, peft: seconds
        from pixart_rt.cli.training_job import Job

        request = finetuning.Request(
            job=Job(
                model=model, out=out, settings=settings, res=res, seed=seed, device=device,
                precision=precision, optimizer=optimizer, checkpointing=checkpointing,
                micro_batches=micro_batches, force=force,
            ),
            images=images, prompt=prompt, class_images=class_images, class_prompt=class_prompt,
            lora=adapter, square=square,
        )  # fmt: skip
        tells = finetuning.finetune(request, progress)
    if tells:
        typer.echo(str(out))
