"""What `pixart-rt finetune controlnet` runs: two stores in, copies trained, a folder of them out.

Checkpoints lie in OUT.run while it trains; the same command goes on from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pixart_rt.cli.finetuning import (
    LOG,
    Progress,
    Shown,
    forget_checkpoints,
    silent,
    usual_precision,
)
from pixart_rt.config import Kernels, Precision
from pixart_rt.data.training_data import paired
from pixart_rt.errors import ConfigError
from pixart_rt.model.checkpoint import load_transformer, read_transformer
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_checkpoint import write_controlnet
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.locate import locate, transformer_path
from pixart_rt.model.pipeline_folder import check_target
from pixart_rt.training.controlnet import ControlNetObjective, trained
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.finetune_settings import FinetuneSettings
from pixart_rt.training.phases import null_of
from pixart_rt.training.ranks import start_ranks
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, RunSettings
from pixart_rt.training.sampler import BucketSampler

SAVE_EVERY = 1000  # steps


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlRequest:
    """What the verb was asked. Without `num_copies`: 13 of 28 blocks, or all for a parallel one."""

    features: Path
    edges: Path
    model: str
    out: Path
    variant: ControlVariant
    num_copies: int | None
    settings: FinetuneSettings
    res: int | None
    seed: int
    device: str | None
    precision: Precision | None
    optimizer: OptimizerKind
    checkpointing: Checkpointing
    parallel: Parallel
    micro_batches: int | None
    workers: int
    force: bool

    def controlnet(self, num_layers: int) -> ControlNetConfig:
        """The ControlNet of a model with so many blocks."""
        usual = num_layers if self.variant is ControlVariant.PARALLEL else (num_layers - 1) // 2
        return ControlNetConfig(variant=self.variant, num_copies=self.num_copies or usual)


def train_controlnet(request: ControlRequest, progress: Progress) -> bool:
    """Train and write the ControlNet. Returns whether this rank is the one that tells.

    Raises ConfigError, DataError or CheckpointError, one line.
    """
    check_target(request.out, request.force)
    folder = locate(request.model, ["transformer"])
    start = read_transformer(transformer_path(folder, request.model, request.res))
    config, asked = start.config, request.settings
    controlnet = request.controlnet(config.num_layers)
    with start_ranks(request.device) as ranks:
        on_gpu = ranks.device.type == "cuda"
        data = paired(request.features, request.edges, workers=request.workers, pin=on_gpu)
        _check_resolution(request, data.buckets[0].height, data.buckets[0].width, config.resolution)
        base = load_transformer(start, torch.float32)
        model = ControlNetTransformer.of(base, controlnet).to(ranks.device)
        model.use(Kernels.FUSED if on_gpu else Kernels.REFERENCE)
        objective = ControlNetObjective(
            model, GaussianDiffusion(), null_of(start, data.empty_prompt), asked.text_dropout
        )
        settings = RunSettings(
            steps=asked.steps,
            lr=asked.lr,
            optimizer=request.optimizer,
            weight_decay=asked.weight_decay,
            eps=None if request.optimizer is OptimizerKind.CAME else asked.eps,  # it has two
            clip_norm=asked.clip_norm,
            ema_decay=None,
            precision=request.precision or usual_precision(ranks.device),
            micro_batches=request.micro_batches or ranks.num_ranks,
            parallel=request.parallel,
            checkpointing=request.checkpointing,
            seed=request.seed,
            save_every=SAVE_EVERY,
            keep=1,
        )
        sampler = BucketSampler(
            data.bucket_of,
            [bucket.num_tokens for bucket in data.buckets],
            token_budget=asked.batch * config.base_size**2,
            multiple=settings.micro_batches,
            seed=request.seed,
        )
        run = request.out.with_name(f"{request.out.name}.run")
        trainer = Shown(
            objective,
            data.feed(
                lambda step: sampler.ids(step, ranks.rank, ranks.num_ranks).tolist(), request.seed
            ),
            settings,
            run,
            ranks,
            identity={
                "model": request.model,
                "controlnet": controlnet.to_dict(),
                "batch": asked.batch,
                "data": data.identity,
            },
            log=LOG,
            progress=progress if ranks.is_first else silent,
        )
        trainer.run()
        weights = trainer.weights(average=False)
        if ranks.is_first:
            write_controlnet(trained(objective, weights, str(request.out)), request.out)
            forget_checkpoints(run)
        ranks.barrier()
        return ranks.is_first


def _check_resolution(request: ControlRequest, height: int, width: int, resolution: int) -> None:
    """Buckets have nearly their resolution's area; the next resolution's have a quarter of it."""
    if not 0.5 < height * width / resolution**2 < 2:
        raise ConfigError(
            f"{request.features} has images such as {width}x{height}, {request.model} is a "
            f"{resolution} px model; extract them with --res {resolution}"
        )
