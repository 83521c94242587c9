"""The options that verbs of `pixart-rt finetune` have in common, as Typer reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pixart_rt.config import Precision
from pixart_rt.files import check_source
from pixart_rt.training.finetune.settings import JobOptions, LoraTargets
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel

DATA = "a feature store, or pictures with captions"

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
Recompute = Annotated[Checkpointing, typer.Option(help="Recompute activations in the backward.")]
MicroBatches = Annotated[int | None, typer.Option(help="Parts of a step, one after the other.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")]
Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A feature store, or pictures with captions.")
]
StepBatch = Annotated[int, typer.Option(help="Images of a step.")]
Share = Annotated[Parallel, typer.Option(help="How ranks share.")]
Workers = Annotated[int, typer.Option(help="Processes that read data, for each rank.")]
Targets = Annotated[LoraTargets, typer.Option(help="Linears of the blocks that get adapters.")]
Alpha = Annotated[
    float | None, typer.Option(help="Adapters count alpha / rank times. Default: the rank.")
]

_OF_A_JOB: dict[str, Any] = {  # fields of JobOptions, in the order that help shows
    "res": Res,
    "seed": Seed,
    "device": Device,
    "precision": Floats,
    "optimizer": Optimizer,
    "checkpointing": Recompute,
    "parallel": Share,
    "micro_batches": MicroBatches,
    "workers": Workers,
    "force": Force,
}
_OF_RANKS = ("parallel", "workers")


def with_job_options(*, ranks: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of a verb that takes `options`: the fields of JobOptions become its options.

    ranks: with those for several ranks. Typer reads the signature, so the verb gets one that names
    them all.
    """
    names = [name for name in _OF_A_JOB if ranks or name not in _OF_RANKS]
    defaults = {field.name: field.default for field in fields(JobOptions)}

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(verb, include_extras=True)
        kinds = {name: hints[name] for name in signature(verb).parameters if name != "options"}

        def run(**values: Any) -> None:
            options = JobOptions(**{name: values.pop(name) for name in names})
            verb(**values, options=options)

        own = [
            parameter.replace(annotation=kinds[name], kind=Parameter.KEYWORD_ONLY)
            for name, parameter in signature(verb).parameters.items()
            if name != "options"
        ]
        shared = [
            Parameter(
                name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=_OF_A_JOB[name]
            )
            for name in names
        ]
        run.__name__, run.__doc__ = verb.__name__, verb.__doc__
        run.__annotations__ = kinds | {name: _OF_A_JOB[name] for name in names}
        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        return run

    return decorate


def check_pictures(images: Path, class_images: Path | None) -> None:
    """Refuse folders that are not there before seconds of imports. Raises DataError."""
    for folder in (images, class_images):
        if folder is not None:
            check_source(folder, "pictures")
