"""ControlNet training from end to end: images and edges in, copies trained, a folder out.

Two stores, or pictures whose edges are found while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pixart_rt.checkpoints.controlnet import write_controlnet
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS
from pixart_rt.data.control import PairedSource
from pixart_rt.data.edges import EdgeKind, edge_finder
from pixart_rt.data.loader import Source
from pixart_rt.data.store import FeatureStore
from pixart_rt.data.training_data import is_store, open_data
from pixart_rt.errors import ConfigError
from pixart_rt.files import CONTROLNET as CONTROLNET_FOLDER
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.finetune.job import Job, check_shapes, open_base, train_and_write
from pixart_rt.training.finetune.settings import (
    CONTROLNET,
    DEFAULT_MODEL,
    DEFAULT_OPTIONS,
    FinetuneSettings,
    JobOptions,
)
from pixart_rt.training.objectives.controlnet import ControlNetObjective, trained
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.progress import Progress, silent
from pixart_rt.training.sample_source import feed_of, null_of, sampler_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlData:
    """Images with their edges: a store and its companion, or pictures that are searched for edges.

    `edges` is a store's companion; `condition` (canny by default) and `square` are of pictures.
    """

    data: Path
    edges: Path | None = None
    condition: str | None = None  # an EdgeKind
    square: bool = False

    def __post_init__(self) -> None:
        if self.condition is not None and self.condition not in list(EdgeKind):
            raise ConfigError(
                f"`condition` {self.condition} is not supported; choose one of "
                f"{', '.join(EdgeKind)}"
            )
        if not is_store(self.data):
            if self.edges is not None:
                raise ConfigError(
                    f"`edges` were given, but {self.data} is no feature store; extract one, or "
                    "leave `edges` out: edges of pictures are found while training"
                )
            return
        if self.edges is None:
            raise ConfigError(
                f"{self.data} is a feature store, which holds no pictures to find edges in; give "
                "the store of what `pixart-rt data edges` drew as `edges`"
            )
        if self.condition is not None or self.square:
            raise ConfigError(
                "`condition` and `square` are for pictures; the edges of a store are those that "
                "`pixart-rt data edges` drew"
            )

    def open(self, resolution: int, encoder: str, device: torch.device) -> Source:
        """The samples with their control images; the model `encoder` encodes pictures."""
        if self.edges is not None:
            return PairedSource(FeatureStore(self.data), FeatureStore(self.edges))
        kind = EdgeKind.CANNY if self.condition is None else EdgeKind(self.condition)
        return open_data(
            self.data,
            resolution=resolution,
            square=self.square,
            encoder=encoder,
            device=device,
            edges=edge_finder(kind),
        )


def train_controlnet(
    data: ControlData,
    out: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    variant: ControlVariant = ControlVariant.CHAINED,
    copies: int | None = None,
    settings: FinetuneSettings = CONTROLNET,
    options: JobOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> Path:
    """Train copies of a model's blocks on images and their edges; write the copies, return `out`.

    copies: blocks that are copied; by default 13 of 28, or all for a parallel ControlNet.
    A run that was stopped is resumed by the same call. Raises ConfigError, DataError or
    CheckpointError, one line each.
    """
    job = Job(model=model, out=Path(out), settings=settings, options=options)
    parts = ["transformer"] if data.edges is not None else COMPONENTS
    base = open_base(job, parts, CONTROLNET_FOLDER)
    start = base.checkpoint
    shape = _controlnet(variant, copies, start.config.num_layers)
    shape.check(start.config)
    with start_ranks(options.device) as ranks:
        samples = data.open(start.config.resolution, model, ranks.device)
        check_shapes(data.data, samples, job, start.config.resolution)
        controlled = ControlNetTransformer.of(base.load(ranks.device), shape)
        objective = ControlNetObjective(
            controlled.use(usual_kernels(ranks.device)),
            GaussianDiffusion(),
            null_of(start, samples.empty_prompt),
            settings.text_dropout,
        )
        sampler = sampler_of(
            samples,
            batch=settings.batch,
            base_size=start.config.base_size,
            multiple=job.run_settings(ranks).micro_batches,
            seed=options.seed,
        )
        train_and_write(
            job,
            objective,
            feed_of(samples, sampler, ranks, workers=options.workers),
            ranks,
            identity={
                "model": model,
                "controlnet": shape.to_dict(),
                "batch": settings.batch,
                "data": samples.identity,
            },
            progress=progress,
            write=lambda weights: write_controlnet(
                trained(objective, weights, str(job.out)), job.out, force=options.force
            ),
        )
    return job.out


def _controlnet(variant: ControlVariant, copies: int | None, num_layers: int) -> ControlNetConfig:
    """The ControlNet of a model with so many blocks."""
    usual = num_layers if variant is ControlVariant.PARALLEL else (num_layers - 1) // 2
    return ControlNetConfig(variant=variant, num_copies=copies or usual)
