"""What `pixart-rt finetune controlnet` runs: images and edges in, copies trained, a folder out.

Two stores, or pictures whose edges are found while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pixart_rt.checkpoints.controlnet import write_controlnet
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS
from pixart_rt.cli.training_job import Job, Progress, check_shapes, open_base, train_and_write
from pixart_rt.data.edges import EdgeKind, edge_finder
from pixart_rt.data.training_data import TrainingData, is_store, open_data, paired
from pixart_rt.errors import ConfigError
from pixart_rt.files import CONTROLNET
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.objectives.controlnet import ControlNetObjective, trained
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.sample_source import feed_of, null_of, sampler_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlRequest:
    """What the verb was asked. Without `num_copies`: 13 of 28 blocks, or all for a parallel one.

    `edges` is a store's companion; `condition` and `square` are of pictures.
    """

    job: Job
    data: Path
    edges: Path | None
    condition: EdgeKind | None
    square: bool
    variant: ControlVariant
    num_copies: int | None
    workers: int

    def __post_init__(self) -> None:
        if not is_store(self.data):
            if self.edges is not None:
                raise ConfigError(
                    f"EDGES were given, but {self.data} is no feature store; extract one, or leave "
                    "EDGES out: edges of pictures are found while training"
                )
            return
        if self.edges is None:
            raise ConfigError(
                f"{self.data} is a feature store, which holds no pictures to find edges in; give "
                "the store of what `pixart-rt data edges` drew as EDGES"
            )
        if self.condition is not None or self.square:
            raise ConfigError(
                "--condition and --square are for pictures; the edges of a store are those that "
                "`pixart-rt data edges` drew"
            )

    def controlnet(self, num_layers: int) -> ControlNetConfig:
        """The ControlNet of a model with so many blocks."""
        usual = num_layers if self.variant is ControlVariant.PARALLEL else (num_layers - 1) // 2
        return ControlNetConfig(variant=self.variant, num_copies=self.num_copies or usual)

    def open(self, resolution: int, device: torch.device) -> TrainingData:
        """The samples with their control images."""
        if self.edges is not None:
            pin = device.type == "cuda"
            return paired(self.data, self.edges, workers=self.workers, pin=pin)
        return open_data(
            self.data,
            resolution=resolution,
            square=self.square,
            encoder=self.job.model,
            device=device,
            workers=self.workers,
            edges=edge_finder(self.condition or EdgeKind.CANNY),
        )


def train_controlnet(request: ControlRequest, progress: Progress) -> bool:
    """Train and write the ControlNet. Returns whether this rank is the one that tells.

    Raises ConfigError, DataError or CheckpointError, one line.
    """
    job = request.job
    parts = ["transformer"] if request.edges is not None else COMPONENTS
    base = open_base(job, parts, CONTROLNET)
    start = base.checkpoint
    controlnet = request.controlnet(start.config.num_layers)
    controlnet.check(start.config)
    with start_ranks(job.device) as ranks:
        data = request.open(start.config.resolution, ranks.device)
        check_shapes(request.data, data, job, start.config.resolution)
        model = ControlNetTransformer.of(base.load(ranks.device), controlnet)
        objective = ControlNetObjective(
            model.use(usual_kernels(ranks.device)),
            GaussianDiffusion(),
            null_of(start, data.empty_prompt),
            job.settings.text_dropout,
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
            identity={
                "model": job.model,
                "controlnet": controlnet.to_dict(),
                "batch": job.settings.batch,
                "data": data.identity,
            },
            progress=progress,
            write=lambda weights: write_controlnet(
                trained(objective, weights, str(job.out)), job.out, force=job.force
            ),
        )
