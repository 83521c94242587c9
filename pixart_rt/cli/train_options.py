"""The options of `pixart-rt train` as Typer reads them; run_options.py of training checks them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli.prompts_file import read_prompts
from pixart_rt.config import Kernels, Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.presets import Preset
from pixart_rt.training.run_options import ValidationImages
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, Place

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A .toml file; or by name: own-images, pixart-alpha, tiny."
    ),
]
RunFolder = Annotated[Path, typer.Option(help="The run's folder; a run there is resumed.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="The data of a phase, by the recipe's name for it or the phase's: a feature store "
        "or a folder of pictures. {res} stands for the phase's resolution.",
    ),
]
Phases = Annotated[
    list[str] | None, typer.Option("--phase", help="Only this phase. Default: all, in order.")
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="What the first phase that is run starts from, instead of the recipe's: a "
        "checkpoint, tiny, a pipeline folder or a hub id.",
    ),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Write OUT/pipeline at the end: this one with the last phase's average, for "
        "`pixart-rt build`.",
    ),
]
PresetName = Annotated[Preset | None, typer.Option(help="Instead of the recipe's.")]
Encoder = Annotated[
    str | None,
    typer.Option(help="Encodes folders of pictures: tiny, a pipeline folder or a hub id."),
]
NumSteps = Annotated[int | None, typer.Option(help="Instead of the recipe's.")]
GlobalBatch = Annotated[
    int | None, typer.Option(help="Images of a step, all ranks. Default: the recipe's.")
]
MicroBatches = Annotated[
    int | None,
    typer.Option(
        help="Parts of a step, all ranks (gradient accumulation). Default: parts of at most the "
        "recipe's batch_per_gpu."
    ),
]
Floats = Annotated[
    Precision | None,
    typer.Option(
        help="Of matrix products. Default: the recipe's, or bf16, before sm_80 fp16, on a CPU fp32."
    ),
]
Optimizer = Annotated[
    OptimizerKind | None, typer.Option(help="Default: the recipe's; adamw is the paper's.")
]
Share = Annotated[Parallel, typer.Option(help="How ranks share.")]
Reproducible = Annotated[
    bool, typer.Option("--reproducible", help="The same bits on 1, 2, 4... ranks; slower.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")]
Recompute = Annotated[Checkpointing, typer.Option(help="Recompute activations in the backward.")]
KernelChoice = Annotated[
    Kernels | None, typer.Option(help="Default: fused on a GPU, else reference.")
]
EmaOnCpu = Annotated[bool, typer.Option("--ema-on-cpu", help="Keep the average in host memory.")]
Seed = Annotated[int, typer.Option(help="Decides all that is random.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu.")]
Workers = Annotated[int, typer.Option(help="Processes that read data, for each rank.")]
Logs = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(Place)}. Default: the first two.")
]
LogEvery = Annotated[int, typer.Option(help="Steps.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Keep = Annotated[int, typer.Option(help="Checkpoints that are kept.")]
ValidateWith = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Draw images in text phases, with the encoder, VAE and sampler of: tiny, a "
        "pipeline folder or a hub id.",
    ),
]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between them.")]
Prompts = Annotated[Path | None, typer.Option(help="Their prompts: a text file, one a line.")]
ProfileEvery = Annotated[
    int | None,
    typer.Option(
        help="Steps between two that are profiled, a multiple of --log-every; their log line "
        "has the share of communication. On GPUs."
    ),
]
Replay = Annotated[
    int | None,
    typer.Option(help="Run this step of --phase again and print what was not finite in it."),
]


def data_paths(given: Iterable[str]) -> dict[str, str]:
    """The values of --data by name."""
    pairs = {}
    for text in given:
        match = re.fullmatch(r"([^=]+)=(.+)", text)
        if match is None:
            raise ConfigError(f"--data {text!r} was given; write it as NAME=PATH")
        pairs[match[1]] = match[2]
    return pairs


def validation_images(
    model: str | None, every: int | None, prompts: Path | None
) -> ValidationImages | None:
    """The options of validation images: all three, or none of them."""
    named = {"--validate-with": model, "--validate-every": every, "--prompts": prompts}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named):
        return None
    if model is None or every is None or prompts is None:
        raise ConfigError(
            f"validation images were requested without {' and '.join(missing)}; give "
            f"{', '.join(named)}"
        )
    return ValidationImages(model=model, every=every, prompts=tuple(read_prompts(prompts)))
