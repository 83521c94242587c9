"""`pixart-rt finetune`: a LoRA or all weights from a few pictures; a ControlNet from edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli.console import Steps
from pixart_rt.config import Precision
from pixart_rt.model.controlnet_config import ControlVariant
from pixart_rt.training.finetune_settings import (
    CONTROLNET,
    DREAMBOOTH,
    LORA,
    FinetuneSettings,
    LoraSettings,
    LoraTargets,
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
Images = Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of pictures.")]
Model = Annotated[str, typer.Option(help="tiny, a diffusers pipeline folder or a hub id.")]
Out = Annotated[Path, typer.Option(help="The folder to write.")]
Prompt = Annotated[
    str | None,
    typer.Option(help="Of all pictures. Default: captions of metadata.jsonl in IMAGES."),
]
ClassImages = Annotated[
    Path | None,
    typer.Option(help="Pictures of the class, to keep what the model knows of it."),
]
ClassPrompt = Annotated[str | None, typer.Option(help="Of the class pictures.")]
PriorWeight = Annotated[float, typer.Option(help="Of the class pictures' loss.")]
Count = Annotated[int, typer.Option(help="Steps of the optimiser.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Batch = Annotated[int, typer.Option(help="Images of a step; as many of the class besides.")]
TextDropout = Annotated[float, typer.Option(help="Share of captions left out.")]
Res = Annotated[int | None, typer.Option(help="256: tiny's model for that.")]
Square = Annotated[bool, typer.Option("--square", help="Crop to the square, not 40 shapes.")]
Seed = Annotated[int, typer.Option(help="Decides all that is random.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: a GPU if there is one.")]
Floats = Annotated[
    Precision | None, typer.Option(help="Of matrix products. Default: the device's.")
]
Optimizer = Annotated[OptimizerKind, typer.Option(help="adamw8bit and came need less memory.")]
Recompute = Annotated[Checkpointing, typer.Option(help="Activations computed again.")]
MicroBatches = Annotated[int | None, typer.Option(help="Parts of a step, one after the other.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")]
DEFAULT_MODEL = "PixArt-alpha/PixArt-XL-2-1024-MS"


@finetune.command()
def lora(
    images: Images,
    out: Out,
    model: Model = DEFAULT_MODEL,
    prompt: Prompt = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = _RANK.rank,
    alpha: Annotated[
        float | None, typer.Option(help="Adapters count alpha / rank times. Default: the rank.")
    ] = None,
    targets: Annotated[
        LoraTargets, typer.Option(help="Linears of the blocks that get adapters.")
    ] = _RANK.targets,
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
def controlnet(
    features: Annotated[
        Path, typer.Argument(metavar="FEATURES", help="A feature store of captioned images.")
    ],
    edges: Annotated[Path, typer.Argument(metavar="EDGES", help="A feature store of their edges.")],
    out: Out,
    model: Model = DEFAULT_MODEL,
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
    seed: Seed = 0,
    device: Device = None,
    precision: Floats = None,
    optimizer: Optimizer = OptimizerKind.ADAMW,
    checkpointing: Recompute = Checkpointing.NONE,
    parallel: Annotated[Parallel, typer.Option(help="How ranks share.")] = Parallel.DDP,
    micro_batches: MicroBatches = None,
    workers: Annotated[int, typer.Option(help="Processes that read data, for each rank.")] = 2,
    force: Force = False,
) -> None:
    """Train a ControlNet on images and their edges.

    Both stores are made by `pixart-rt data extract`, the second from what `pixart-rt data edges`
    drew. OUT holds the copied blocks; `pixart-rt build --controlnet OUT` takes it. A run that was
    stopped goes on with the same command.

    \b
    Examples:
      pixart-rt finetune controlnet features/ edge-features/ --out hed
      pixart-rt finetune controlnet features-256/ edges-256/ --model tiny --res 256 --out hed \\
          --variant parallel --steps 100
    """
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.cli import control_training  # torch: seconds

        request = control_training.ControlRequest(
            features=features, edges=edges, model=model, out=out, variant=variant,
            num_copies=copies,
            settings=replace(CONTROLNET, steps=steps, lr=lr, batch=batch,
                             text_dropout=text_dropout),
            res=res, seed=seed, device=device, precision=precision, optimizer=optimizer,
            checkpointing=checkpointing, parallel=parallel, micro_batches=micro_batches,
            workers=workers, force=force,
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
    with Steps() as progress:
        progress("starting", 0, 1)
        from pixart_rt.cli import finetuning  # torch, peft: seconds

        request = finetuning.Request(
            images=images, model=model, out=out, prompt=prompt, class_images=class_images,
            class_prompt=class_prompt, settings=settings, lora=adapter, res=res, square=square,
            seed=seed, device=device, precision=precision, optimizer=optimizer,
            checkpointing=checkpointing, micro_batches=micro_batches, force=force,
        )  # fmt: skip
        tells = finetuning.finetune(request, progress)
    if tells:
        typer.echo(str(out))
