"""LCM distillation from end to end: a guided model in, a student of a few steps out.

all weights   a pipeline folder whose scheduler is LCM's
an adapter    a LoRA whose origin.json says the same to `pixart-rt merge`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline, write_model
from pixart_rt.config import Scheduler
from pixart_rt.data.training_data import is_store, open_data
from pixart_rt.errors import ConfigError
from pixart_rt.files import ADAPTER, PIPELINE
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.finetune.adapter_switch import adapter_off
from pixart_rt.training.finetune.job import (
    Base,
    Job,
    check_shapes,
    of_model,
    open_base,
    train_and_write,
)
from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler
from pixart_rt.training.finetune.lora import add_lora, write_adapter
from pixart_rt.training.finetune.settings import (
    DEFAULT_MODEL,
    DEFAULT_OPTIONS,
    LCM,
    LCM_GUIDANCE,
    FinetuneSettings,
    JobOptions,
    LoraSettings,
)
from pixart_rt.training.objectives.lcm import FULL, ConsistencyDistillation, LcmSettings
from pixart_rt.training.objectives.lcm import LORA as LCM_LORA
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.progress import Progress, on_first, silent
from pixart_rt.training.run_settings import Parallel
from pixart_rt.training.sample_source import feed_of, null_of, sampler_of


def train_lcm(
    data: str | Path,
    out: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    adapter: LoraSettings | None = None,
    guidance_w: float = LCM_GUIDANCE,
    square: bool = False,
    settings: FinetuneSettings = LCM,
    options: JobOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> Path:
    """Distil a model into a student of 1 to 8 steps without guidance; write and return `out`.

    data: a feature store, or a folder of pictures with captions, which `square` crops to squares.
    adapter: train a LoRA of these settings (LCM_ADAPTER), not all weights.
    guidance_w: the teacher's guidance_scale less 1. The rate for another batch is `lcm_lr(batch)`.
    A run that was stopped is resumed by the same call. Raises ConfigError, DataError or
    CheckpointError, one line each.
    """
    job = Job(model=model, out=Path(out), settings=settings, options=options)
    data, distillation = Path(data), _distillation(adapter, guidance_w)
    _check(job, data, adapter, square)
    base = _teacher(job, adapter, stored=is_store(data))
    asked = _asked(job, adapter, distillation)
    with start_ranks(options.device) as ranks:
        on_first(ranks, progress)("reading the data", 0, 1)
        config = base.checkpoint.config
        samples = open_data(
            data,
            resolution=config.resolution,
            square=square,
            encoder=model,
            device=ranks.device,
        )
        check_shapes(data, samples, job, config.resolution)
        student = base.load(ranks.device)
        if adapter is not None:
            add_lora(student, adapter, options.seed)
        objective = ConsistencyDistillation(
            student.use(usual_kernels(ranks.device)),
            GaussianDiffusion(),
            null_of(base.checkpoint, samples.empty_prompt),
            distillation,
            adapter_off=None if adapter is None else lambda: adapter_off(student),
        )
        sampler = sampler_of(
            samples,
            batch=settings.batch,
            base_size=config.base_size,
            multiple=job.run_settings(ranks).micro_batches,
            seed=options.seed,
        )
        train_and_write(
            job,
            objective,
            feed_of(samples, sampler, ranks, workers=options.workers),
            ranks,
            identity={"asked": asked, "data": samples.identity},
            progress=progress,
            write=lambda weights: _write(job, base, adapter, asked, weights),
        )
    return job.out


def _distillation(adapter: LoraSettings | None, guidance_w: float) -> LcmSettings:
    if adapter is None:
        return replace(FULL, guidance_w=guidance_w)
    return replace(LCM_LORA, guidance_w=guidance_w, lora_rank=adapter.rank)


def _check(job: Job, data: Path, adapter: LoraSettings | None, square: bool) -> None:
    parallel = job.options.parallel
    if adapter is not None and parallel is not Parallel.DDP:
        raise ConfigError(
            f"`parallel` {parallel} is not supported with `adapter`, whose weights are switched "
            f"off and on in each step; use {Parallel.DDP}, which holds one copy"
        )
    if square and is_store(data):
        raise ConfigError(
            f"`square` is for pictures; {data} is a feature store, whose pictures are cut already"
        )


def _teacher(job: Job, adapter: LoraSettings | None, *, stored: bool) -> Base:
    """The model to distil; with an adapter on a store its transformer is enough."""
    alone = adapter is not None and stored
    kind = PIPELINE if adapter is None else ADAPTER
    base = open_base(job, ["transformer"] if alone else COMPONENTS, kind)
    if adapter is None and not is_pipeline(base.folder):
        raise ConfigError(
            f"{job.model} is no pipeline folder, and a student's scheduler has its place in one; "
            "give the whole pipeline, or train an adapter with `adapter`"
        )
    return base


def _asked(job: Job, adapter: LoraSettings | None, distillation: LcmSettings) -> dict[str, Any]:
    """What made the result, as plain values; `scheduler` is what samples it."""
    return {
        "made_by": f"pixart-rt finetune lcm{'' if adapter is None else ' --lora'}",
        "model": job.model,
        "seed": job.options.seed,
        "scheduler": str(Scheduler.LCM),
        "settings": asdict(job.settings),
        "lcm": asdict(distillation),
        "lora": None if adapter is None else asdict(adapter),
    }


def _write(
    job: Job,
    base: Base,
    adapter: LoraSettings | None,
    asked: Mapping[str, Any],
    weights: dict[str, Tensor],
) -> None:
    if adapter is not None:
        write_adapter(job, base, adapter, asked, weights)
        return
    student = replace(base.checkpoint, state=of_model(weights), origin=base.origin(asked))
    write_model(
        student,
        job.out,
        pipeline=base.folder,
        finish=use_lcm_scheduler,
        force=job.options.force,
    )
