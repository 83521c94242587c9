"""One phase of a recipe: it starts from what the one before left, trains, and leaves its weights.

    out/01-pixel-dependency/       trainer.py's files, exposure.json
        dit-ema.pt  dit-raw.pt     of a class-conditional phase
        transformer-ema/  -raw/    of a text phase: diffusers folders for `pixart-rt build`
    out/02-text-image-256/ ...

A phase is done when its done.json is there, which records the settings it was trained with. The
data comes from outside (data/loader.py): this file knows neither stores nor encoders.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
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
from pixart_rt.data.loader import Source
from pixart_rt.errors import CheckpointError, ConfigError, DataError
from pixart_rt.files import replacing
from pixart_rt.model.dit import DiT, DiTConfig, initialize_dit
from pixart_rt.training.device_defaults import check_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.micro_batches import count_micro_batches
from pixart_rt.training.next_phase import for_next_phase
from pixart_rt.training.objectives.denoising import ClassObjective, Objective, TextObjective
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.recipe import Phase, Recipe, Start, Weights
from pixart_rt.training.reparameterize import reparameterize
from pixart_rt.training.run_options import TrainOptions
from pixart_rt.training.run_settings import Place, RunSettings
from pixart_rt.training.sample_source import feed_of, null_of, sampler_of
from pixart_rt.training.sampler import BucketSampler
from pixart_rt.training.trainer import Trainer
from pixart_rt.training.weight_init import from_scratch

_log = logging.getLogger(__name__)

Checkpoint = DiTCheckpoint | TransformerCheckpoint
Validate = Callable[[dict[str, Tensor], int], None]  # whole weights by name, steps done
EXPOSURE, DONE = "exposure.json", "done.json"


def phase_folder(recipe: Recipe, phase: Phase, out: Path) -> Path:
    return Path(out) / f"{recipe.phases.index(phase) + 1:02d}-{phase.name}"


def result_path(phase: Phase, folder: Path, weights: Weights) -> Path:
    """Where a phase leaves its weights."""
    return folder / (f"dit-{weights}.pt" if phase.of_classes else f"transformer-{weights}")


def global_batch(recipe: Recipe, phase: Phase, options: TrainOptions) -> int:
    """Images of a step, of all ranks."""
    batch = options.overrides.batch
    return phase.global_batch(recipe.settings) if batch is None else batch


def run_settings(
    recipe: Recipe, phase: Phase, options: TrainOptions, num_ranks: int
) -> RunSettings:
    """The recipe's optimiser under these options. The rate follows the batch that is really used,
    and a micro-batch has at most the images that the recipe gives a GPU.

    A precision that nobody chose is bf16; `with_device_defaults` (run.py) chooses it first.
    """
    overrides, compute, records = options.overrides, options.compute, options.records
    batch = global_batch(recipe, phase, options)
    optimizer = recipe.phase_optimizer(phase, batch=batch, kind=overrides.optimizer)
    validate_every = options.validation.every if options.validation else None
    return RunSettings(
        steps=phase.steps if overrides.steps is None else overrides.steps,
        lr=optimizer.lr,
        warmup=optimizer.warmup,
        decay=optimizer.decay,
        optimizer=optimizer.kind,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        clip_norm=optimizer.clip_norm,
        ema_decay=recipe.ema_decay,
        ema_on_cpu=compute.ema_on_cpu,
        precision=compute.precision or recipe.precision or Precision.BF16,
        micro_batches=count_micro_batches(
            batch,
            num_ranks,
            asked=overrides.micro_batches,
            most=phase.images_per_gpu(recipe.settings),
        ),
        parallel=compute.parallel,
        reproducible=compute.reproducible,
        compile=compute.compile,
        checkpointing=compute.checkpointing,
        seed=options.seed,
        log_every=records.log_every,
        save_every=records.save_every,
        keep=records.keep,
        validate_every=None if phase.of_classes else validate_every,
        profile_every=records.profile_every,
    )


def phase_trainer(
    recipe: Recipe,
    phase: Phase,
    source: Source,
    options: TrainOptions,
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
    settings = run_settings(recipe, phase, options, ranks.num_ranks)
    start = start_of(recipe, phase, out, init, options.seed)
    objective = objective_of(recipe, phase, start, source, options, ranks.device)
    sampler = sampler_of(
        source,
        batch=global_batch(recipe, phase, options),
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
        feed_of(source, sampler, ranks, workers=options.compute.workers),
        settings,
        folder,
        ranks,
        identity={**_identity(recipe, phase, options), "data": source.identity},
        log=[Place(place) for place in options.records.log],
        validation=validate,
    )
    return trainer, start, sampler


def run_phase(
    recipe: Recipe,
    phase: Phase,
    source: Source,
    options: TrainOptions,
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
    if is_done(recipe, phase, options, out):
        return done
    trainer, start, sampler = phase_trainer(
        recipe, phase, source, options, out, ranks, init=init, validation=validation
    )
    if ranks.is_first and (short := sampler.repeating()):
        _log.warning(
            "%d of %d images are in %d aspect ratios with fewer images than a step; their steps "
            "repeat images, so a smaller batch may train better",
            sampler.counts[short].sum(), sampler.counts.sum(), len(short),
        )  # fmt: skip
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
            temporary.write_text(json.dumps(exposure, indent=1) + "\n", encoding="utf-8")
        with replacing(folder / DONE) as temporary:
            record = _asked(recipe, phase, options)
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ranks.barrier()
    return done


def is_done(recipe: Recipe, phase: Phase, options: TrainOptions, out: Path) -> bool:
    """Whether a phase was trained to its end. Raises ConfigError if with other settings."""
    path = phase_folder(recipe, phase, out) / DONE
    if not path.is_file():
        return False
    found, asked = json.loads(path.read_text(encoding="utf-8")), _asked(recipe, phase, options)
    for name, value in json.loads(json.dumps(asked)).items():
        if found.get(name) != value:
            raise ConfigError(
                f"phase {phase.name} was trained in {path.parent} with {name} {found.get(name)}, "
                f"this run has {value}; resume it with the same, or train in another folder"
            )
    return True


def _asked(recipe: Recipe, phase: Phase, options: TrainOptions) -> dict[str, Any]:
    """The settings that distinguish finished phases; not how many ranks shared one."""
    overrides = replace(options.overrides, micro_batches=1)  # not part of it, and ranks neither
    settings = run_settings(recipe, phase, replace(options, overrides=overrides), 1)
    asked = {**settings.identity(), **_identity(recipe, phase, options), "steps": settings.steps}
    del asked["micro_batches"]
    return asked


def _identity(recipe: Recipe, phase: Phase, options: TrainOptions) -> dict[str, Any]:
    """The settings that loss and samples depend on, besides RunSettings."""
    return {
        "phase": phase.name,
        "batch": global_batch(recipe, phase, options),
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
        config = _with_its_positions(config, phase, checkpoint)
    return for_next_phase(checkpoint, replace(config, cfg_null=checkpoint.config.cfg_null), seed)


def objective_of(
    recipe: Recipe,
    phase: Phase,
    start: Checkpoint,
    source: Source,
    options: TrainOptions,
    device: torch.device,
) -> Objective:
    """The phase's objective from its start, on a device.

    Kernels are compared with their references there first, in autocast's dtype too.
    """
    precision = options.compute.precision or recipe.precision or Precision.BF16
    kernels = options.compute.kernels or Kernels.REFERENCE
    check_kernels(device, kernels, precision)
    diffusion, shift = GaussianDiffusion(min_snr_gamma=recipe.min_snr_gamma), phase.timestep_shift
    if isinstance(start, DiTCheckpoint):
        dit = load_dit(start, torch.float32).to(device).use(kernels)
        return ClassObjective(dit, diffusion, recipe.label_dropout, timestep_shift=shift)
    model = load_transformer(start, torch.float32).to(device).use(kernels)
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


def _with_its_positions(
    config: ModelConfig, phase: Phase, start: TransformerCheckpoint
) -> ModelConfig:
    """The phase's configuration with the positions of a start of its resolution.

    Those are what the weights learned. The preset's are for a change of resolution; others are a
    setting of the phase, and the log says so.
    """
    old, new = start.config.interpolation_scale, config.interpolation_scale
    if start.config.sample_size != config.sample_size or old == new:
        return config
    if phase.interpolation_scale is None:
        return replace(config, interpolation_scale=old)
    _log.warning(
        "phase %s changes the positions of %s: interpolation_scale %s becomes %s", phase.name,
        start.source, old, new,
    )  # fmt: skip
    return config


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
            "checkpoint to start from as `init`"
        )
    before = recipe.phases[number - 1]
    path = result_path(before, phase_folder(recipe, before, out), phase.start_weights)
    if not path.exists():
        raise CheckpointError(
            f"phase {phase.name} starts from {path}, which is not there; run {before.name} first, "
            "or give another checkpoint as `init`"
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
