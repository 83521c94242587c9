"""Runs a recipe: each phase starts from what the one before it left, and leaves its weights.

    out/01-pixel-dependency/       trainer.py's files, exposure.json
        dit-ema.pt  dit-raw.pt     of a class-conditional phase
        transformer-ema/  -raw/    of a text phase: diffusers folders for `pixart-rt build`
    out/02-text-image-256/ ...

A phase is done when its done.json is there, which says as what it was trained. The data comes from
outside (sample_source.py): this file knows neither stores nor encoders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.buckets import PIXELS_PER_TOKEN
from pixart_rt.checkpoints.dit import DiTCheckpoint, load_dit, read_dit, write_dit
from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
    write_diffusers,
)
from pixart_rt.config import Kernels, ModelConfig, Precision
from pixart_rt.errors import CheckpointError, ConfigError, DataError
from pixart_rt.files import replacing
from pixart_rt.model.dit import DiT, DiTConfig, initialize_dit
from pixart_rt.training.device_defaults import check_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.log_writers import Place
from pixart_rt.training.next_phase import for_next_phase
from pixart_rt.training.objectives.denoising import ClassObjective, Objective, TextObjective
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.recipe import Phase, Recipe, Start, Weights
from pixart_rt.training.reparameterize import reparameterize
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, RunSettings
from pixart_rt.training.sample_source import Source, feed_of, null_of, sampler_of
from pixart_rt.training.sampler import BucketSampler
from pixart_rt.training.trainer import Trainer
from pixart_rt.training.weight_init import from_scratch

Checkpoint = DiTCheckpoint | TransformerCheckpoint
Validate = Callable[[dict[str, Tensor], int], None]  # whole weights by name, steps done
EXPOSURE, DONE = "exposure.json", "done.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a recipe leaves to where it runs. None takes the recipe's."""

    steps: int | None = None
    batch: int | None = None  # images of a step, over all ranks
    micro_batches: int | None = None  # None: one for each rank
    optimizer: OptimizerKind | None = None
    precision: Precision = Precision.BF16
    parallel: Parallel = Parallel.DDP
    reproducible: bool = False
    compile: bool = False
    checkpointing: Checkpointing = Checkpointing.NONE
    kernels: Kernels = Kernels.REFERENCE
    ema_on_cpu: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3
    validate_every: int | None = None  # of text phases; what draws is given to run_phase
    profile_every: int | None = None
    log: Collection[Place] = (Place.CONSOLE, Place.JSONL)


def phase_folder(recipe: Recipe, phase: Phase, out: Path) -> Path:
    return Path(out) / f"{recipe.phases.index(phase) + 1:02d}-{phase.name}"


def result_path(phase: Phase, folder: Path, weights: Weights) -> Path:
    """Where a phase leaves its weights."""
    return folder / (f"dit-{weights}.pt" if phase.of_classes else f"transformer-{weights}")


def global_batch(recipe: Recipe, phase: Phase, machine: Machine) -> int:
    """Images of a step, of all ranks."""
    if machine.batch is None:
        return phase.global_batch(recipe.settings)
    if machine.batch < 1:
        raise ConfigError(f"a batch of {machine.batch} images was asked; it must be positive")
    return machine.batch


def run_settings(recipe: Recipe, phase: Phase, machine: Machine, num_ranks: int) -> RunSettings:
    """The recipe's optimiser on this machine. The rate follows the batch that is really used."""
    preset = recipe.settings
    optimizer = machine.optimizer or recipe.optimizer
    adam = optimizer is not OptimizerKind.CAME  # whose betas and eps are its own
    return RunSettings(
        steps=phase.steps if machine.steps is None else machine.steps,
        lr=preset.effective_lr(phase.lr, global_batch(recipe, phase, machine)),
        warmup=phase.warmup(preset),
        decay=phase.decay,
        optimizer=optimizer,
        weight_decay=preset.weight_decay,
        betas=preset.betas if adam else None,
        eps=preset.eps if adam else None,
        clip_norm=preset.clip_norm,
        ema_decay=recipe.ema_decay,
        ema_on_cpu=machine.ema_on_cpu,
        precision=machine.precision,
        micro_batches=num_ranks if machine.micro_batches is None else machine.micro_batches,
        parallel=machine.parallel,
        reproducible=machine.reproducible,
        compile=machine.compile,
        checkpointing=machine.checkpointing,
        seed=machine.seed,
        log_every=machine.log_every,
        save_every=machine.save_every,
        keep=machine.keep,
        validate_every=None if phase.of_classes else machine.validate_every,
        profile_every=machine.profile_every,
    )


def phase_trainer(
    recipe: Recipe,
    phase: Phase,
    source: Source,
    machine: Machine,
    out: Path,
    ranks: Ranks,
    *,
    init: Path | None = None,
    validation: Callable[[TransformerCheckpoint, Path], Validate] | None = None,
) -> tuple[Trainer, Checkpoint, BucketSampler]:
    """The trainer of a phase, the checkpoint that it starts from, and its sampler.

    `validation` makes what draws validation images of a text phase, from its start and its folder;
    it is called on the first rank alone.
    """
    check_source(phase, source)
    settings = run_settings(recipe, phase, machine, ranks.num_ranks)
    start = start_of(recipe, phase, out, init, machine.seed)
    objective = objective_of(recipe, phase, start, source, machine, ranks.device)
    sampler = sampler_of(
        source,
        batch=global_batch(recipe, phase, machine),
        base_size=phase.resolution // PIXELS_PER_TOKEN,
        multiple=settings.micro_batches,
        seed=settings.seed,
    )
    folder = phase_folder(recipe, phase, out)
    validate = None
    if validation is not None and ranks.is_first and isinstance(start, TransformerCheckpoint):
        validate = validation(start, folder)
    trainer = Trainer(
        objective,
        feed_of(source, sampler, ranks),
        settings,
        folder,
        ranks,
        identity={**_identity(recipe, phase, machine), "data": source.identity},
        log=machine.log,
        validation=validate,
    )
    return trainer, start, sampler


def run_phase(
    recipe: Recipe,
    phase: Phase,
    source: Source,
    machine: Machine,
    out: Path,
    ranks: Ranks,
    *,
    init: Path | None = None,
    validation: Callable[[TransformerCheckpoint, Path], Validate] | None = None,
) -> Path:
    """Train a phase to its end, from wherever it stopped; returns where its weights are.

    `init` is where the recipe's first phase starts, if not from random weights. Raises ConfigError
    for data or a start that does not fit, CheckpointError for one that is missing.
    """
    folder = phase_folder(recipe, phase, out)
    done = result_path(phase, folder, Weights.EMA)
    if is_done(recipe, phase, machine, out):
        return done
    trainer, start, sampler = phase_trainer(
        recipe, phase, source, machine, out, ranks, init=init, validation=validation
    )
    trainer.run()
    exposure = [asdict(each) for each in sampler.exposure(trainer.done)]
    for weights in Weights:
        state = trainer.weights(average=weights is Weights.EMA)
        if ranks.is_first:
            _write(start, state, result_path(phase, folder, weights), trainer, recipe)
    if ranks.is_first:
        for each in exposure:
            bucket = source.buckets[each["bucket"]]
            each |= {"height": bucket.height, "width": bucket.width}
        with replacing(folder / EXPOSURE) as temporary:
            temporary.write_text(json.dumps(exposure, indent=1) + "\n")
        with replacing(folder / DONE) as temporary:
            record = _asked(recipe, phase, machine)
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    ranks.barrier()
    return done


def is_done(recipe: Recipe, phase: Phase, machine: Machine, out: Path) -> bool:
    """Whether a phase was trained to its end. Raises ConfigError where it was as something else."""
    path = phase_folder(recipe, phase, out) / DONE
    if not path.is_file():
        return False
    found, asked = json.loads(path.read_text()), _asked(recipe, phase, machine)
    for name, value in json.loads(json.dumps(asked)).items():
        if found.get(name) != value:
            raise ConfigError(
                f"phase {phase.name} was trained in {path.parent} with {name} {found.get(name)}, "
                f"this run has {value}; go on with the same, or in another folder"
            )
    return True


def _asked(recipe: Recipe, phase: Phase, machine: Machine) -> dict[str, Any]:
    """What makes a finished phase another one; not how many ranks shared it."""
    settings = run_settings(recipe, phase, machine, 1)
    asked = {**settings.identity(), **_identity(recipe, phase, machine), "steps": settings.steps}
    del asked["micro_batches"]
    return asked


def _identity(recipe: Recipe, phase: Phase, machine: Machine) -> dict[str, Any]:
    """What a phase's loss and samples depend on, beside RunSettings."""
    return {
        "phase": phase.name,
        "batch": global_batch(recipe, phase, machine),
        "text_dropout": recipe.text_dropout,
        "label_dropout": recipe.label_dropout,
        "min_snr_gamma": recipe.min_snr_gamma,
        "timestep_shift": phase.timestep_shift,
    }


def start_of(recipe: Recipe, phase: Phase, out: Path, init: Path | None, seed: int) -> Checkpoint:
    """The weights that a phase starts from, under its own configuration."""
    config = phase.model_config(recipe.settings, _text_config(recipe))
    if phase.start is Start.RANDOM and init is None:
        return _random_dit(recipe, phase, seed) if phase.of_classes else from_scratch(config, seed)
    path = _before(recipe, phase, out, init)
    if phase.of_classes:
        return read_dit(path, heads=recipe.model.num_heads)
    if phase.start is Start.REPARAMETERIZED:
        shape = replace(
            recipe.text_start,
            sample_size=config.sample_size,
            interpolation_scale=config.interpolation_scale,
            caption_channels=config.caption_channels,
            max_text_tokens=config.max_text_tokens,
        )
        checkpoint = reparameterize(read_dit(path, heads=recipe.model.num_heads), shape)
    else:
        checkpoint = read_transformer(path)
    return for_next_phase(checkpoint, replace(config, cfg_null=checkpoint.config.cfg_null), seed)


def objective_of(
    recipe: Recipe,
    phase: Phase,
    start: Checkpoint,
    source: Source,
    machine: Machine,
    device: torch.device,
) -> Objective:
    """What the phase minimises, from its start, on a device: kernels are compared with their
    references there first, in the dtypes of autocast too."""
    check_kernels(device, machine.kernels, machine.precision)
    diffusion, shift = GaussianDiffusion(min_snr_gamma=recipe.min_snr_gamma), phase.timestep_shift
    if isinstance(start, DiTCheckpoint):
        dit = load_dit(start, torch.float32).to(device).use(machine.kernels)
        return ClassObjective(dit, diffusion, recipe.label_dropout, timestep_shift=shift)
    model = load_transformer(start, torch.float32).to(device).use(machine.kernels)
    null = null_of(start, source.empty_prompt)
    return TextObjective(model, diffusion, null, recipe.text_dropout, timestep_shift=shift)


def check_source(phase: Phase, source: Source) -> None:
    """Raises DataError where a phase cannot train on the shapes of its data."""
    shapes = {(bucket.height, bucket.width) for bucket in source.buckets}
    square = {(phase.resolution, phase.resolution)}
    if not phase.multi_scale and shapes != square:
        raise DataError(
            f"phase {phase.name} trains squares of {phase.resolution} px, but its data has "
            f"{len(shapes)} shapes; extract it with --res {phase.resolution} --square"
        )
    if phase.multi_scale and (shapes == square or square - shapes):
        raise DataError(
            f"phase {phase.name} trains aspect ratios around {phase.resolution} px, but its data "
            f"has {sorted(shapes)[:3]}...; extract it with --res {phase.resolution}"
        )


def _text_config(recipe: Recipe) -> ModelConfig:
    return replace(recipe.model.config(), cfg_null=recipe.text_start.cfg_null)


def _before(recipe: Recipe, phase: Phase, out: Path, init: Path | None) -> Path:
    """The checkpoint that the phase before left; for the first, `init`."""
    number = recipe.phases.index(phase)
    if init is not None:
        return init
    if number == 0:
        raise ConfigError(
            f"phase {phase.name} starts {phase.start}, and no phase is before it; give the "
            "checkpoint to start from with --init"
        )
    before = recipe.phases[number - 1]
    path = result_path(before, phase_folder(recipe, before, out), phase.start_weights)
    if not path.exists():
        raise CheckpointError(
            f"phase {phase.name} starts from {path}, which is not there; run {before.name} first, "
            "or give another checkpoint with --init"
        )
    return path


def _random_dit(recipe: Recipe, phase: Phase, seed: int) -> DiTCheckpoint:
    shape = recipe.model
    config = DiTConfig(
        num_classes=shape.num_classes,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        sample_size=phase.resolution // 8,
    )
    dit = initialize_dit(DiT(config), torch.Generator().manual_seed(seed))
    return DiTCheckpoint(config, dict(dit.state_dict()), f"random weights, seed {seed}")


def _write(
    start: Checkpoint, state: dict[str, Tensor], path: Path, trainer: Trainer, recipe: Recipe
) -> None:
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if isinstance(start, DiTCheckpoint):
        write_dit(replace(start, state=state), path)
        return
    origin = {
        **(start.origin or {}),
        "trained": {
            **trainer.identity, "steps": trainer.done, "lr": trainer.settings.lr,
            "skipped": int(trainer.skipped.item()), "preset": str(recipe.preset),
        },
    }  # fmt: skip
    write_diffusers(replace(start, state=state, origin=origin), path)
