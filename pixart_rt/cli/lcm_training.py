"""What `pixart-rt finetune lcm` runs: a guided model in, a student of a few steps out.

all weights   a pipeline folder whose scheduler is LCM's
--lora        an adapter whose origin.json says the same to `pixart-rt merge`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline, write_model
from pixart_rt.cli.training_job import (
    Base,
    Job,
    Progress,
    check_shapes,
    of_model,
    on_first,
    open_base,
    train_and_write,
)
from pixart_rt.config import Scheduler
from pixart_rt.data.training_data import is_store, open_data
from pixart_rt.errors import ConfigError
from pixart_rt.files import ADAPTER, PIPELINE
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.finetune.adapter_switch import adapter_off
from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler
from pixart_rt.training.finetune.lora import adapters_in, add_lora, save_lora
from pixart_rt.training.finetune.settings import LoraSettings
from pixart_rt.training.objectives.lcm import ConsistencyDistillation, LcmSettings
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import Parallel
from pixart_rt.training.sample_source import feed_of, null_of, sampler_of


@dataclass(frozen=True, kw_only=True, slots=True)
class LcmRequest:
    """What the verb was asked. Without `lora` all weights are trained."""

    job: Job
    data: Path
    lcm: LcmSettings
    lora: LoraSettings | None
    square: bool
    workers: int

    def __post_init__(self) -> None:
        if self.lora is not None and self.job.parallel is not Parallel.DDP:
            raise ConfigError(
                f"--parallel {self.job.parallel} was asked with --lora, whose adapters are "
                f"switched off and on in each step; use {Parallel.DDP}, which holds one copy"
            )
        if self.square and is_store(self.data):
            raise ConfigError(
                f"--square is for pictures; {self.data} is a feature store, whose pictures are cut"
            )


def distil(request: LcmRequest, progress: Progress) -> bool:
    """Train the student and write it. Returns whether this rank is the one that tells.

    Raises ConfigError, DataError or CheckpointError, one line.
    """
    job, lora = request.job, request.lora
    alone = lora is not None and is_store(request.data)
    kind = PIPELINE if lora is None else ADAPTER
    base = open_base(job, ["transformer"] if alone else COMPONENTS, kind)
    if lora is None and not is_pipeline(base.folder):
        raise ConfigError(
            f"{job.model} is no pipeline folder, and a student's scheduler has its place in one; "
            "give the whole pipeline, or train an adapter with --lora"
        )
    start = base.checkpoint
    with start_ranks(job.device) as ranks:
        on_first(ranks, progress)("reading the data", 0, 1)
        data = open_data(
            request.data,
            resolution=start.config.resolution,
            square=request.square,
            encoder=job.model,
            device=ranks.device,
            workers=request.workers,
        )
        check_shapes(request.data, data, job, start.config.resolution)
        model = base.load(ranks.device)
        if lora is not None:
            add_lora(model, lora, job.seed)
        objective = ConsistencyDistillation(
            model.use(usual_kernels(ranks.device)),
            GaussianDiffusion(),
            null_of(start, data.empty_prompt),
            request.lcm,
            adapter_off=None if lora is None else lambda: adapter_off(model),
        )
        sampler = sampler_of(
            data,
            batch=job.settings.batch,
            base_size=start.config.base_size,
            multiple=job.run_settings(ranks).micro_batches,
            seed=job.seed,
        )
        return train_and_write(
            job,
            objective,
            feed_of(data, sampler, ranks),
            ranks,
            identity={"asked": _asked(request), "data": data.identity},
            progress=progress,
            write=lambda weights: _write(request, base, weights),
        )


def _asked(request: LcmRequest) -> dict[str, Any]:
    """What made the result, as plain values; `scheduler` is what samples it."""
    job, lora = request.job, request.lora
    return {
        "made_by": f"pixart-rt finetune lcm{'' if lora is None else ' --lora'}",
        "model": job.model,
        "seed": job.seed,
        "scheduler": str(Scheduler.LCM),
        "settings": asdict(job.settings),
        "lcm": asdict(request.lcm),
        "lora": None if lora is None else asdict(lora),
    }


def _write(request: LcmRequest, base: Base, weights: dict[str, Tensor]) -> None:
    out, origin = request.job.out, base.origin(_asked(request))
    if request.lora is not None:
        adapters = adapters_in(of_model(weights))
        save_lora(out, adapters, request.lora, base=request.job.model, origin=origin,
                  force=request.job.force)  # fmt: skip
        return
    student = replace(base.checkpoint, state=of_model(weights), origin=origin)
    write_model(
        student, out, pipeline=base.folder, finish=use_lcm_scheduler, force=request.job.force
    )
