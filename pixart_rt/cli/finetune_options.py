"""The options that verbs of `pixart-rt finetune` have in common, as Typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.config import Precision
from pixart_rt.training.finetune.settings import LoraTargets
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel

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
