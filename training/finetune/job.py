"""The job that all fine-tuning shares: open the model, train an objective, write the result.

    base = open_base(job, COMPONENTS, PIPELINE)              what cannot be is refused first
    objective, feed = ...                                    lora.py, dreambooth.py, lcm.py, ...
    train_and_write(job, objective, feed, ranks, write=...)  the result is whole or absent

OUT.run holds the log and, while it trains, checkpoints; the same call resumes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.checkpoints.hub import locate, transformer_path
from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
)
from pixart_rt.data.batch import Batch
from pixart_rt.data.loader import Source
from pixart_rt.errors import ConfigError
from pixart_rt.files import Kind, check_into, check_model
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.checkpoints import remove_checkpoints
from pixart_rt.training.device_defaults import check_kernels, usual_kernels, usual_precision
from pixart_rt.training.finetune.settings import FinetuneSettings, JobOptions
from pixart_rt.training.micro_batches import count_micro_batches
from pixart_rt.training.objectives.denoising import Objective
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.prediction_target import check_target
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.progress import Progress, on_first
from pixart_rt.training.run_settings import (
    OptimizerKind,
    Place,
    RunSettings,
)
from pixart_rt.training.trainer import Feed, StepResult, Trainer

LOG = (Place.CONSOLE, Place.JSONL)
LINES, LOG_EVERY = 20, 50  # of the log: so many lines in a short run, one in so many steps
MODEL = "model."  # what the names of an objective's model begin with
SAVES, SAVE_EVERY = 3, 1000  # likewise of checkpoints, of which the last is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One fine-tuning: the model that it starts from, where its result goes, and its settings."""

    model: str
    out: Path
    settings: FinetuneSettings
    options: JobOptions
    images_per_sample: int = 1  # 2 where each image brings one of its class

    @property
    def run_folder(self) -> Path:
        """Where the log and the checkpoints of the result are: next to it."""
        return self.out.with_name(f"{self.out.name}.run")

    def run_settings(self, ranks: Ranks) -> RunSettings:
        """No average is kept: of 300 steps it is mostly the start."""
        asked, options = self.settings, self.options
        return RunSettings(
            steps=asked.steps,
            lr=asked.lr,
            warmup=Warmup(steps=asked.warmup_steps),
            optimizer=options.optimizer,
            weight_decay=asked.weight_decay,
            eps=None if options.optimizer is OptimizerKind.CAME else asked.eps,  # it has two
            clip_norm=asked.clip_norm,
            ema_decay=None,
            precision=options.precision or usual_precision(ranks.device),
            micro_batches=count_micro_batches(
                asked.batch * self.images_per_sample, ranks.num_ranks, asked=options.micro_batches
            ),
            parallel=options.parallel,
            checkpointing=options.checkpointing,
            seed=options.seed,
            log_every=min(LOG_EVERY, -(-asked.steps // LINES)),
            save_every=min(SAVE_EVERY, -(-asked.steps // SAVES)),
            keep=1,
        )


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run starts from, and the folder that it was found in."""

    folder: Path
    checkpoint: TransformerCheckpoint

    def load(self, device: torch.device) -> PixArtTransformer:
        """In float32. Its operators are chosen (`use`) once it has its adapters."""
        return load_transformer(self.checkpoint, torch.float32).to(device)

    def origin(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """How the result was made, and what it was made from."""
        before = self.checkpoint.origin
        return {**made} if before is None else {**made, "base_origin": before}


def open_base(job: Job, components: Sequence[str], kind: Kind | Iterable[Kind]) -> Base:
    """Read the model; of a hub id, only `components` are downloaded. `kind` is the result's.

    Raises ConfigError for a target that may not be written, another resolution than `res`, or a
    model that does not predict noise.
    """
    check_model(job.out, kind, force=job.options.force)
    check_into(job.run_folder)
    folder = locate(job.model, [*components, "scheduler"])
    check_target("`model`", job.model, folder)
    checkpoint = read_transformer(transformer_path(folder, job.model, job.options.res))
    found = checkpoint.config.resolution
    asked = job.options.res
    if asked is not None and found != asked:
        raise ConfigError(f"`res` {asked} was requested, but {job.model} is a {found} px model")
    return Base(folder, checkpoint)


def check_shapes(path: Path, data: Source, job: Job, resolution: int) -> None:
    """Raise ConfigError for data of another resolution than the model's.

    Buckets have nearly their resolution's area; the next resolution's have a quarter of it.
    """
    height, width = data.buckets[0].height, data.buckets[0].width
    if not 0.5 < height * width / resolution**2 < 2:
        raise ConfigError(
            f"{path} has images such as {width}x{height}, {job.model} is a {resolution} px model; "
            f"extract them with --res {resolution}"
        )


def train_and_write(
    job: Job,
    objective: Objective,
    feed: Feed,
    ranks: Ranks,
    *,
    identity: Mapping[str, Any],
    progress: Progress,
    write: Callable[[dict[str, Tensor]], None],
) -> None:
    """Train from wherever the run stopped, and write the result on the first rank.

    `write` gets the weights of `objective.model`, whole, on the CPU, by the objective's names.
    `identity` is what must be the same to resume.
    """
    run, settings = job.run_folder, job.run_settings(ranks)
    check_kernels(ranks.device, usual_kernels(ranks.device), settings.precision)
    trainer = Shown(
        objective, feed, settings, run, ranks, identity=identity, log=LOG,
        progress=on_first(ranks, progress),
    )  # fmt: skip
    trainer.run()
    weights = trainer.weights(average=False, prefix=MODEL)
    if ranks.is_first:
        write(weights)
        remove_checkpoints(run)  # what the run needed to resume; its log stays
    ranks.barrier()


def of_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights by its own names."""
    return {name.removeprefix(MODEL): each for name, each in weights.items()}


class Shown(Trainer):
    """A trainer that tells how far it is."""

    def __init__(self, *arguments: Any, progress: Progress, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._progress = progress

    def observe(self, result: StepResult, batch: Batch) -> None:
        super().observe(result, batch)
        self._progress("training", self.done, self.settings.steps)
