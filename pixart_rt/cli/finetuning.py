"""What `pixart-rt finetune lora` and `dreambooth` run: pictures in, an adapter or a model out.

pictures encoded once -> encoders let go -> model adapted -> trained -> written, whole or absent
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline, write_model
from pixart_rt.cli.training_job import (
    Base,
    Job,
    Progress,
    of_model,
    on_first,
    open_base,
    train_and_write,
)
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, usual_text_precision
from pixart_rt.data.folder import METADATA
from pixart_rt.data.instances import (
    InstanceSource,
    Picture,
    captioned_pictures,
    encode_instances,
    pictures_of,
)
from pixart_rt.data.loader import Batches
from pixart_rt.errors import ConfigError
from pixart_rt.files import ADAPTER, PIPELINE, TRANSFORMER
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.lora import adapters_in, add_lora, save_lora
from pixart_rt.training.finetune.settings import LoraSettings
from pixart_rt.training.objectives.dreambooth import DreamBoothObjective
from pixart_rt.training.prior_pairs import PairedSampler
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.sample_source import null_of
from pixart_rt.training.sampler import BucketSampler, RankIds


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a verb was asked. Without `lora` all weights are trained."""

    job: Job
    images: Path
    prompt: str | None
    class_images: Path | None
    class_prompt: str | None
    lora: LoraSettings | None
    square: bool

    def __post_init__(self) -> None:
        if (self.class_images is None) != (self.class_prompt is None):
            raise ConfigError("--class-images and --class-prompt go together; give both or none")
        if self.prompt is None and not (self.images / METADATA).is_file():
            raise ConfigError(
                f"{self.images} has no {METADATA} with a caption for each picture; write one, or "
                "give one --prompt for all"
            )


def finetune(request: Request, progress: Progress) -> bool:
    """Train and write the result. Returns whether this rank is the one that tells.

    Raises ConfigError, DataError or CheckpointError, one line.
    """
    job = request.job
    base = open_base(
        job, COMPONENTS, ADAPTER if request.lora is not None else (PIPELINE, TRANSFORMER)
    )
    instances, of_class = _pictures(request)
    with start_ranks(job.device) as ranks:
        source, null = _encode(
            request, base, instances, of_class, ranks.device, on_first(ranks, progress)
        )
        model = base.load(ranks.device)
        _choose_what_learns(model, request)
        projected = not any(each.requires_grad for each in model.y_proj.parameters())
        if projected:
            source, null = _projected(source, null, model)
        objective = DreamBoothObjective(
            model.use(usual_kernels(ranks.device)),
            GaussianDiffusion(),
            null,
            num_instances=source.num_instances if of_class else None,
            prior_weight=job.settings.prior_weight,
            text_dropout=job.settings.text_dropout,
            projected=projected,
        )
        ids = RankIds(_sampler(request, source), ranks.rank, ranks.num_ranks)
        return train_and_write(
            job,
            objective,
            Batches(source, ids, seed=job.seed),
            ranks,
            identity={
                "asked": _asked(request),
                "pictures": [sha256(each.path) for each in (*instances, *of_class)],
            },
            progress=progress,
            write=lambda weights: _write(request, base, weights),
        )


def _pictures(request: Request) -> tuple[list[Picture], list[Picture]]:
    if request.prompt is None:
        instances = captioned_pictures(request.images)
    else:
        instances = pictures_of(request.images, request.prompt)
    if request.class_images is None or request.class_prompt is None:
        return instances, []
    return instances, pictures_of(request.class_images, request.class_prompt)


def _encode(
    request: Request,
    base: Base,
    instances: list[Picture],
    of_class: list[Picture],
    device: torch.device,
    progress: Progress,
) -> tuple[InstanceSource, NullText]:
    """The features of all pictures and captions, and of no caption. The encoders are let go."""
    progress("loading the encoders", 0, 1)
    config, settings = base.checkpoint.config, request.job.settings
    encoder = FeatureEncoder.open(
        EncoderConfig(
            model=request.job.model,
            text_precision=usual_text_precision(device),
            max_text_tokens=config.max_text_tokens,
        ),
        device,
    )
    source = encode_instances(
        encoder,
        bucket_table(config.resolution, square=request.square),
        instances,
        of_class,
        repeats=settings.batch,
        progress=progress,
    )
    if settings.text_dropout:
        return source, null_of(base.checkpoint, encoder.text([""])[0][0])
    shape = config.max_text_tokens, config.caption_channels
    return source, NullText(torch.zeros(shape), None)  # never read: no caption is dropped


def _choose_what_learns(model: PixArtTransformer, request: Request) -> None:
    if request.lora is not None:
        add_lora(model, request.lora, request.job.seed)
    else:
        model.requires_grad_(True)
        model.y_proj.requires_grad_(request.job.settings.train_captions)


@torch.no_grad()
def _projected(
    source: InstanceSource, null: NullText, model: PixArtTransformer
) -> tuple[InstanceSource, NullText]:
    """Both through the caption projection, on the model's device."""

    def projection(embeds: Tensor) -> Tensor:
        return model.y_proj(embeds.to(model.x_embedder.weight.device))

    embeds = projection(null.embeds[None].float())[0]
    return source.projected(projection), replace(null, embeds=embeds)


def _sampler(request: Request, source: InstanceSource) -> BucketSampler:
    """Steps of exactly `batch` images whatever their shape, or of as many pairs."""
    tokens, batch = [1] * len(source.buckets), request.job.settings.batch
    if request.class_images is None:
        return BucketSampler(
            source.bucket_of, tokens, token_budget=batch, multiple=batch, seed=request.job.seed
        )
    return PairedSampler(
        source.bucket_of,
        source.num_instances,
        tokens,
        token_budget=2 * batch,
        multiple=2 * batch,
        seed=request.job.seed,
    )


def _asked(request: Request) -> dict[str, Any]:
    """What made the result, as plain values."""
    return {
        "made_by": f"pixart-rt finetune {'dreambooth' if request.lora is None else 'lora'}",
        "model": request.job.model,
        "prompt": request.prompt,
        "class_prompt": request.class_prompt,
        "seed": request.job.seed,
        "settings": asdict(request.job.settings),
        "lora": None if request.lora is None else asdict(request.lora),
    }


def _write(request: Request, base: Base, weights: dict[str, Tensor]) -> None:
    out, origin = request.job.out, base.origin(_asked(request))
    if request.lora is not None:
        adapters = adapters_in(of_model(weights))
        save_lora(out, adapters, request.lora, base=request.job.model, origin=origin,
                  force=request.job.force)  # fmt: skip
        return
    write_model(
        replace(base.checkpoint, state=of_model(weights), origin=origin),
        out,
        pipeline=base.folder if is_pipeline(base.folder) else None,
        force=request.job.force,
    )
