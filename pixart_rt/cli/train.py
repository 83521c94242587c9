"""`pixart-rt train`: a recipe's phases, one after the other, on one process or many."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixart_rt.cli.console import note, print_json
from pixart_rt.config import Kernels, Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.presets import Preset
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel

if TYPE_CHECKING:
    from pixart_rt.training.phases import Machine
    from pixart_rt.training.recipe import Phase, Recipe

LOGS = ("console", "jsonl", "tensorboard", "wandb")


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, .toml.")],
    out: Annotated[Path, typer.Option(help="The run's folder; a run there goes on.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="The data of a phase, by the recipe's name for it or the phase's: a feature store "
            "or a folder of pictures. {res} stands for the phase's resolution.",
        ),
    ] = None,
    phase: Annotated[
        list[str] | None, typer.Option(help="Only this phase. Default: all, in order.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="What the first phase that is run starts from, instead of the recipe's."),
    ] = None,
    preset: Annotated[Preset | None, typer.Option(help="Instead of the recipe's.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Encodes folders of pictures: tiny, a pipeline folder or a hub id."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of a step, all ranks. Default: the recipe's.")
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(help="Parts of a step, all ranks; gradients add up. Default: one a rank."),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of matrix products. Default: bf16, before sm_80 fp16; fp32 on a CPU."),
    ] = None,
    optimizer: Annotated[
        OptimizerKind, typer.Option(help="adamw is the paper's.")
    ] = OptimizerKind.ADAMW,
    parallel: Annotated[Parallel, typer.Option(help="How ranks share.")] = Parallel.DDP,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="The same bits on 1, 2, 4... ranks; slower.")
    ] = False,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")
    ] = False,
    checkpointing: Annotated[
        Checkpointing, typer.Option(help="Activations computed again in the backward.")
    ] = Checkpointing.NONE,
    kernels: Annotated[
        Kernels | None, typer.Option(help="Default: fused on a GPU, else reference.")
    ] = None,
    ema_on_cpu: Annotated[
        bool, typer.Option("--ema-on-cpu", help="Keep the average in host memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides all that is random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read data, for each rank.")] = 2,
    log: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(LOGS)}. Default: the first two.")
    ] = None,
    log_every: Annotated[int, typer.Option(help="Steps.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 3,
    replay: Annotated[
        int | None,
        typer.Option(help="Run this step of --phase again and print what was not finite in it."),
    ] = None,
) -> None:
    """Train the phases of a recipe.

    A run that was stopped goes on with the same command, bit by bit. Under torchrun every process
    is a rank.

    \b
    Examples:
      pixart-rt train recipes/pixart-alpha.toml --out run --data ImageNet=in-256 \\
          --data SAM-LLaVA=sam-256 --data HQ=hq-{res}
      torchrun --nproc-per-node 8 -m pixart_rt train recipes/pixart-alpha.toml --out run \\
          --phase text-image-256 --data SAM-LLaVA=sam-256 --parallel fsdp --compile
      pixart-rt train recipes/pixart-alpha.toml --out run --phase text-image-256 --replay 1234
    """
    from pixart_rt.training.recipe import read_recipe

    read = read_recipe(recipe, preset)
    chosen = _chosen(read, phase or [])
    if replay is not None and len(chosen) != 1:
        raise ConfigError("--replay runs a step of one phase; name it with --phase")
    paths = _data_paths(read, chosen, data or [])
    from pixart_rt.data.training_data import open_data  # torch: seconds
    from pixart_rt.training.log import Place
    from pixart_rt.training.machine import usual_kernels, usual_precision
    from pixart_rt.training.phases import Machine, is_done, phase_folder, phase_trainer, run_phase
    from pixart_rt.training.ranks import start_ranks
    from pixart_rt.training.recipe_report import report
    from pixart_rt.training.replay import replay as run_again

    unknown = sorted(set(log or []) - set(LOGS))
    if unknown:
        raise ConfigError(f"--log {unknown[0]} was asked; choose from {', '.join(LOGS)}")
    with start_ranks(device) as ranks:
        machine = Machine(
            steps=steps,
            batch=batch,
            micro_batches=micro_batches,
            optimizer=optimizer,
            precision=precision or usual_precision(ranks.device),
            parallel=parallel,
            reproducible=reproducible,
            compile=compile_blocks,
            checkpointing=checkpointing,
            kernels=kernels or usual_kernels(ranks.device),
            ema_on_cpu=ema_on_cpu,
            seed=seed,
            log_every=log_every,
            save_every=save_every,
            keep=keep,
            log=[Place(each) for each in log or LOGS[:2]],
        )
        if ranks.is_first and replay is None:
            for line in report(read):
                note(line)
        done = out
        for each in chosen:
            if replay is None and is_done(each, phase_folder(read, each, out)):
                if ranks.is_first:
                    note(f"phase {each.name} is done")
                init = None
                continue
            source = open_data(
                paths[each.name],
                resolution=each.resolution,
                square=not each.multi_scale,
                encoder=encoder,
                device=ranks.device,
                workers=workers,
            )
            if replay is not None:
                trainer, *_ = phase_trainer(read, each, source, machine, out, ranks, init=init)
                found = run_again(trainer, replay)
                if ranks.is_first:
                    print_json(found)
                return
            if ranks.is_first:
                note(_started(read, each, machine, ranks.num_ranks, len(source)))
            done = run_phase(read, each, source, machine, out, ranks, init=init)
            init = None  # of the first phase that is run
        if ranks.is_first:
            typer.echo(str(done))


def _chosen(recipe: Recipe, names: list[str]) -> list[Phase]:
    """The named phases in the recipe's order."""
    known = [phase.name for phase in recipe.phases]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--phase {unknown[0]} is not in the recipe; it has {', '.join(known)}")
    return [phase for phase in recipe.phases if not names or phase.name in names]


def _data_paths(recipe: Recipe, phases: list[Phase], given: list[str]) -> dict[str, Path]:
    """Where the data of each phase is, by the phase's name."""
    pairs = dict(_pair(each) for each in given)
    known = {phase.name for phase in recipe.phases} | {phase.data for phase in recipe.phases}
    for name in pairs:
        if name not in known:
            raise ConfigError(
                f"--data {name}=... names no data of the recipe; there are "
                f"{', '.join(sorted({phase.data for phase in recipe.phases}))}, and the phases"
            )
    found = {}
    for phase in phases:
        path = pairs.get(phase.name, pairs.get(phase.data))
        if path is None:
            raise ConfigError(
                f"phase {phase.name} trains on {phase.data}; say where it is with "
                f"--data {phase.data}=PATH"
            )
        found[phase.name] = Path(path.replace("{res}", str(phase.resolution)))
    return found


def _pair(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"([^=]+)=(.+)", text)
    if match is None:
        raise ConfigError(f"--data {text!r} was given; write it as NAME=PATH")
    return match[1], match[2]


def _started(recipe: Recipe, phase: Phase, machine: Machine, num_ranks: int, samples: int) -> str:
    from pixart_rt.training.phases import run_settings

    settings = run_settings(recipe, phase, machine, num_ranks)
    batch = machine.batch or phase.global_batch(recipe.settings)
    return (
        f"phase {phase.name}: {samples} samples, {settings.steps} steps of {batch} images in "
        f"{settings.micro_batches} micro-batches on {num_ranks} ranks, lr {settings.lr:.3g}, "
        f"warm-up {settings.warmup.steps:g} steps, {settings.optimizer}, {settings.precision}"
    )
