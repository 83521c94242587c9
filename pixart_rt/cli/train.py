"""`pixart-rt train`: a recipe's phases, one after the other, on one process or many."""

from __future__ import annotations

import typer

from pixart_rt.cli import train_options as given
from pixart_rt.cli.console import print_json
from pixart_rt.errors import ConfigError
from pixart_rt.training.recipe import read_recipe
from pixart_rt.training.run_options import (
    Compute,
    Overrides,
    Records,
    TrainOptions,
)
from pixart_rt.training.run_settings import Checkpointing, Parallel

COMPUTE, RECORDS = Compute(), Records()  # their defaults are the options'


def train(
    recipe: given.RecipeFile,
    out: given.RunFolder,
    data: given.Data = None,
    phases: given.Phases = None,
    init: given.Init = None,
    pipeline: given.Pipeline = None,
    preset: given.PresetName = None,
    encoder: given.Encoder = None,
    steps: given.NumSteps = None,
    batch: given.GlobalBatch = None,
    micro_batches: given.MicroBatches = None,
    precision: given.Floats = None,
    optimizer: given.Optimizer = None,
    parallel: given.Share = Parallel.DDP,
    reproducible: given.Reproducible = False,
    compile: given.Compile = False,
    checkpointing: given.Recompute = Checkpointing.NONE,
    kernels: given.KernelChoice = None,
    ema_on_cpu: given.EmaOnCpu = False,
    seed: given.Seed = 0,
    device: given.Device = None,
    workers: given.Workers = COMPUTE.workers,
    log: given.Logs = None,
    log_every: given.LogEvery = RECORDS.log_every,
    save_every: given.SaveEvery = RECORDS.save_every,
    keep: given.Keep = RECORDS.keep,
    validate_with: given.ValidateWith = None,
    validate_every: given.ValidateEvery = None,
    prompts: given.Prompts = None,
    profile_every: given.ProfileEvery = None,
    replay: given.Replay = None,
) -> None:
    """Train the phases of a recipe.

    The same command resumes a run that was stopped, bit-identically. Under torchrun every process
    is a rank.

    \b
    Examples:
      pixart-rt train pixart-alpha --out run --data ImageNet=in-256 \\
          --data SAM-LLaVA=sam-256 --data HQ=hq-{res}
      torchrun --nproc-per-node 8 -m pixart_rt train pixart-alpha --out run \\
          --phase text-image-256 --data SAM-LLaVA=sam-256 --parallel fsdp --compile
      pixart-rt train own-images --out run --data own=features \\
           --init PixArt-alpha/PixArt-XL-2-1024-MS
      pixart-rt train pixart-alpha --out run --phase text-image-256 --replay 1234
    """
    settings, names = read_recipe(recipe, preset), phases or []
    options = TrainOptions(
        overrides=Overrides(
            steps=steps, batch=batch, micro_batches=micro_batches, optimizer=optimizer
        ),
        compute=Compute(
            device=device, precision=precision, kernels=kernels, parallel=parallel,
            reproducible=reproducible, compile=compile, checkpointing=checkpointing,
            ema_on_cpu=ema_on_cpu, workers=workers,
        ),
        records=Records(
            log=tuple(log) if log else RECORDS.log, log_every=log_every, save_every=save_every,
            keep=keep, profile_every=profile_every,
        ),
        validation=given.validation_images(validate_with, validate_every, prompts),
        seed=seed,
    )  # fmt: skip
    paths = given.data_paths(data or [])
    if replay is not None and len(names) != 1 and len(settings.phases) != 1:
        raise ConfigError("--replay runs a step of one phase; name it with --phase")
    from pixart_rt.training import run  # torch: seconds
    from pixart_rt.training.process_group import is_first_rank

    if replay is None:
        result = run.train(
            settings, paths, out, phases=names, init=init, pipeline=pipeline, encoder=encoder,
            options=options,
        )  # fmt: skip
    else:
        phase = names[0] if names else settings.phases[0].name
        report = run.replay_step(
            settings, paths, out, phase, replay, init=init, encoder=encoder, options=options
        )
    if not is_first_rank():
        return
    if replay is None:
        typer.echo(str(result))
    else:
        print_json(report)
