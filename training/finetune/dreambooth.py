"""DreamBooth (arXiv:2208.12242; paper, Section A.9): all weights on a few pictures of a subject."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline, write_model
from pixart_rt.files import PIPELINE, TRANSFORMER
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.finetune.few_pictures import (
    Pictures,
    asked_of_pictures,
    train_on_pictures,
)
from pixart_rt.training.finetune.job import of_model, open_base
from pixart_rt.training.finetune.settings import (
    DEFAULT_MODEL,
    DEFAULT_OPTIONS,
    DREAMBOOTH,
    FinetuneSettings,
    JobOptions,
)
from pixart_rt.training.progress import Progress, silent


def train_dreambooth(
    pictures: Pictures,
    out: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    settings: FinetuneSettings = DREAMBOOTH,
    options: JobOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> Path:
    """Train all weights on pictures; write a pipeline folder where `model` is one, and return it.

    A run that was stopped is resumed by the same call. Raises ConfigError, DataError or
    CheckpointError, one line each.
    """
    job = pictures.job(out, model, settings, options)
    base = open_base(job, COMPONENTS, (PIPELINE, TRANSFORMER))
    asked = {**asked_of_pictures("dreambooth", pictures, job), "lora": None}

    def adapt(transformer: PixArtTransformer) -> None:
        transformer.requires_grad_(True)
        transformer.y_proj.requires_grad_(settings.train_captions)

    def write(weights: dict[str, Tensor]) -> None:
        write_model(
            replace(base.checkpoint, state=of_model(weights), origin=base.origin(asked)),
            job.out,
            pipeline=base.folder if is_pipeline(base.folder) else None,
            force=options.force,
        )

    train_on_pictures(pictures, job, base, asked=asked, adapt=adapt, write=write, progress=progress)
    return job.out
