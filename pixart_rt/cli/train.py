"""`pixart-rt train`: a recipe's phases, one after the other, on one process or many."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.cli.prompts_file import read_prompts
from pixart_rt.config import Kernels, Precision
from pixart_rt.errors import ConfigError
from pixart_rt.files import PIPELINE, TRANSFORMER, check_file, check_folder, check_into
from pixart_rt.training.presets import Preset
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel
from pixart_rt.training.tiny.kinds import Scenes

if TYPE_CHECKING:
    from pixart_rt.checkpoints.transformer import TransformerCheckpoint
    from pixart_rt.training.process_group import Ranks
    from pixart_rt.training.recipe import Phase, Recipe
    from pixart_rt.training.run import Machine, Validate
    from pixart_rt.training.tiny.source import SceneSource

LOGS = ("console", "jsonl", "tensorboard", "wandb")


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, .toml.")],
    out: Annotated[Path, typer.Option(help="The run's folder; a run there goes on.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="The data of a phase, by the recipe's name for it or the phase's: a feature store "
            "or a folder of pictures. {res} stands for the phase's resolution. Data named scenes "
            "or scenes-classes are drawn and need none.",
        ),
    ] = None,
    phase: Annotated[
        list[str] | None, typer.Option(help="Only this phase. Default: all, in order.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What the first phase that is run starts from, instead of the recipe's: a "
            "checkpoint, tiny, a pipeline folder or a hub id.",
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Write OUT/pipeline at the end: this one with the last phase's average, for "
            "`pixart-rt build`.",
        ),
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
        typer.Option(
            help="Of matrix products. Default: the recipe's, or bf16, before sm_80 fp16, on a CPU "
            "fp32."
        ),
    ] = None,
    optimizer: Annotated[
        OptimizerKind | None, typer.Option(help="Default: the recipe's; adamw is the paper's.")
    ] = None,
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
    validate_with: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Draw images in text phases, with the encoder, VAE and sampler of: tiny, a "
            "pipeline folder or a hub id.",
        ),
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between them.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Their prompts: a text file, one a line.")
    ] = None,
    profile_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two that are profiled, a multiple of --log-every; their log line "
            "has the share of communication. On GPUs."
        ),
    ] = None,
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
      pixart-rt train recipes/tiny.toml --out run
      pixart-rt train recipes/pixart-alpha.toml --out run --phase text-image-256 --replay 1234
    """
    from pixart_rt.training.recipe import Weights, read_recipe

    read = read_recipe(recipe, preset)
    chosen = _chosen(read, phase or [])
    if replay is not None and len(chosen) != 1:
        raise ConfigError("--replay runs a step of one phase; name it with --phase")
    if pipeline is not None and chosen[-1].of_classes:
        raise ConfigError(
            f"--pipeline was asked, but the last phase is {chosen[-1].name}, of classes; run a "
            "text phase after it, or leave it out"
        )
    paths = _data_paths(read, chosen, data or [])
    texts = _validation_prompts(chosen, validate_with, validate_every, prompts)
    unknown = sorted(set(log or []) - set(LOGS))
    if unknown:
        raise ConfigError(f"--log {unknown[0]} was asked; choose from {', '.join(LOGS)}")
    _check_places(out, paths, pipeline, encoder, validate_with)
    _check_results(read, chosen, out)
    from pixart_rt.data.training_data import open_data  # torch: seconds
    from pixart_rt.training.device_defaults import usual_kernels, usual_precision
    from pixart_rt.training.log_writers import Place
    from pixart_rt.training.process_group import start_ranks
    from pixart_rt.training.recipe_report import report
    from pixart_rt.training.replay import replay as run_again
    from pixart_rt.training.run import (
        Machine,
        is_done,
        phase_folder,
        phase_trainer,
        result_path,
        run_phase,
    )

    if reproducible:
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
    with start_ranks(device) as ranks:
        machine = Machine(
            steps=steps,
            batch=batch,
            micro_batches=micro_batches,
            optimizer=optimizer,
            precision=precision or read.precision or usual_precision(ranks.device),
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
            validate_every=validate_every,
            profile_every=profile_every,
            log=[Place(each) for each in log or LOGS[:2]],
        )
        if ranks.is_first and replay is None:
            for line in report(read, _num_parameters(read)):
                note(line)
        start = _located(init, chosen[0]) if init else None
        drawing = _drawing(validate_with, texts, machine, ranks) if validate_with else None
        done = out
        for each in chosen:
            if replay is None and is_done(read, each, machine, out):
                if ranks.is_first:
                    unused = f"; --init {init} is not used" if start else ""
                    note(f"phase {each.name} is done{unused}")
                start, done = None, result_path(each, phase_folder(read, each, out), Weights.EMA)
                continue
            source = (
                open_data(
                    paths[each.name],
                    resolution=each.resolution,
                    square=not each.multi_scale,
                    encoder=encoder,
                    device=ranks.device,
                    workers=workers,
                )
                if each.name in paths
                else _scenes(each, out, ranks)
            )
            if replay is not None:
                trainer, *_ = phase_trainer(read, each, source, machine, out, ranks, init=start)
                found = run_again(trainer, replay)
                if ranks.is_first:
                    print_json(found)
                return
            if ranks.is_first:
                note(_started(read, each, machine, ranks.num_ranks, len(source)))
            done = run_phase(
                read, each, source, machine, out, ranks, init=start, validation=drawing
            )
            start = None  # of the first phase that is run
        if ranks.is_first:
            if pipeline is not None:
                done = _whole(done, pipeline, out / "pipeline")
            typer.echo(str(done))


def _num_parameters(recipe: Recipe) -> int:
    """Of the text model without micro-conditioning."""
    from pixart_rt.checkpoints.tensor_names import expected_shapes

    return sum(shape.numel() for shape in expected_shapes(recipe.model.config()).values())


def _chosen(recipe: Recipe, names: list[str]) -> list[Phase]:
    """The named phases in the recipe's order."""
    known = [phase.name for phase in recipe.phases]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--phase {unknown[0]} is not in the recipe; it has {', '.join(known)}")
    return [phase for phase in recipe.phases if not names or phase.name in names]


def _data_paths(recipe: Recipe, phases: list[Phase], given: list[str]) -> dict[str, Path]:
    """Where the data of each phase is, by the phase's name; not of those on drawn scenes."""
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
        if path is None and phase.data in set(Scenes):
            continue
        if path is None:
            raise ConfigError(
                f"phase {phase.name} trains on {phase.data}; say where it is with "
                f"--data {phase.data}=PATH"
            )
        found[phase.name] = Path(path.replace("{res}", str(phase.resolution)))
    return found


def _check_places(
    out: Path,
    data: dict[str, Path],
    pipeline: str | None,
    encoder: str | None,
    validate_with: str | None,
) -> None:
    """Refuse now what the last phase would fail on after days. Raises ConfigError, CheckpointError.

    The run's folder may hold anything: its phases look after their own (training/trainer.py).
    """
    from pixart_rt.checkpoints.hub import locate_whole
    from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline  # torch: seconds

    check_into(out)
    for phase, path in data.items():
        if not path.is_dir():
            raise ConfigError(
                f"{path}, the data of phase {phase}, is no feature store and no folder of "
                "pictures; check --data"
            )
    if pipeline is not None:
        check_folder(out / "pipeline", PIPELINE, force=True)  # of this run, or not ours
        if not is_pipeline(locate_whole("--pipeline", pipeline, COMPONENTS[1:])):
            raise ConfigError(f"--pipeline {pipeline} was asked, which has no model_index.json")
    if encoder is not None:
        locate_whole("--encoder", encoder, ("vae", "text_encoder", "tokenizer"))
    if validate_with is not None:
        locate_whole("--validate-with", validate_with, COMPONENTS[1:])


def _check_results(recipe: Recipe, phases: list[Phase], out: Path) -> None:
    """Refuse now phases whose weights could not be written at their end. Raises ConfigError."""
    from pixart_rt.training.recipe import Weights
    from pixart_rt.training.run import DONE, phase_folder, result_path

    for phase in phases:
        folder = phase_folder(recipe, phase, out)
        if (folder / DONE).is_file():
            continue
        for weights in Weights:
            path = result_path(phase, folder, weights)
            if phase.of_classes:
                check_file(path, force=True)
            else:
                check_folder(path, TRANSFORMER, force=True)


def _located(model: str, phase: Phase) -> Path:
    """The checkpoint of a path, of tiny or of a hub id, for a phase."""
    from pixart_rt.checkpoints.hub import locate, transformer_path

    return transformer_path(locate(model, ["transformer"]), model, phase.resolution)


def _whole(transformer: Path, model: str, out: Path) -> Path:
    """A copy of the pipeline `model` with this transformer."""
    from pixart_rt.checkpoints.hub import locate
    from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, write_model
    from pixart_rt.checkpoints.transformer import read_transformer

    write_model(read_transformer(transformer), out, pipeline=locate(model, COMPONENTS))
    return out


def _validation_prompts(
    phases: list[Phase], model: str | None, every: int | None, prompts: Path | None
) -> tuple[str, ...]:
    """The prompts of validation images; none where no images are asked."""
    given = {"--validate-with": model, "--validate-every": every, "--prompts": prompts}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return ()
    if missing or prompts is None:
        raise ConfigError(
            f"validation images were asked without {' and '.join(missing)}; give {', '.join(given)}"
        )
    if all(phase.of_classes for phase in phases):
        raise ConfigError(
            "validation images were asked, but no text phase is run, and a DiT draws none; leave "
            f"out {', '.join(given)}"
        )
    return tuple(read_prompts(prompts))


def _drawing(
    model: str, prompts: tuple[str, ...], machine: Machine, ranks: Ranks
) -> Callable[[TransformerCheckpoint, Path], Validate]:
    """What draws the images of a phase; prompts are encoded when the phase begins."""
    from pixart_rt.training.distributed import DTYPES
    from pixart_rt.training.validation import Validation, ValidationSettings

    autocast = None if machine.precision is Precision.FP32 else DTYPES[machine.precision]

    def begin(start: TransformerCheckpoint, folder: Path) -> Validate:
        validation = Validation(
            model,
            start.config,
            ValidationSettings(prompts=prompts),
            ranks.device,
            autocast=autocast,
            y_embedding=start.y_embedding,
        )
        return lambda weights, step: note(str(validation.of_weights(weights, folder, step)))

    return begin


def _pair(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"([^=]+)=(.+)", text)
    if match is None:
        raise ConfigError(f"--data {text!r} was given; write it as NAME=PATH")
    return match[1], match[2]


def _scenes(phase: Phase, out: Path, ranks: Ranks) -> SceneSource:
    """The drawn scenes of a phase, their latents under the run's folder."""
    from pixart_rt.training.tiny.source import open_scenes, phase_buckets

    with Steps() as steps:
        name = f"encoding scenes for {phase.name}"
        return open_scenes(
            Scenes(phase.data),
            phase.num_images,
            phase_buckets(phase.resolution, phase.multi_scale),
            out / "scenes",
            ranks,
            progress=(lambda done, total: steps(name, done, total)) if ranks.is_first else None,
        )


def _started(recipe: Recipe, phase: Phase, machine: Machine, num_ranks: int, samples: int) -> str:
    from pixart_rt.training.run import global_batch, run_settings

    settings = run_settings(recipe, phase, machine, num_ranks)
    batch = global_batch(recipe, phase, machine)
    return (
        f"phase {phase.name}: {samples} samples, {settings.steps} steps of {batch} images in "
        f"{settings.micro_batches} micro-batches on {num_ranks} ranks, lr {settings.lr:.3g}, "
        f"warm-up {settings.warmup.steps:g} steps, {settings.optimizer}, {settings.precision}"
    )
