"""Training on a few pictures, which LoRA (lora.py) and DreamBooth (dreambooth.py) share.

pictures encoded once -> encoders freed -> model adapted -> trained -> written, whole or absent
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.device_defaults import usual_kernels
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.job import Base, Job, train_and_write
from pixart_rt.training.finetune.settings import FinetuneSettings, JobOptions
from pixart_rt.training.objectives.dreambooth import DreamBoothObjective
from pixart_rt.training.prior_pairs import PairedSampler
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.progress import Progress, on_first
from pixart_rt.training.sample_source import null_of
from pixart_rt.training.sampler import BucketSampler, RankIds


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """A folder of pictures of one thing or style, and of its class for prior preservation."""

    images: Path
    prompt: str | None = None  # of all pictures; None: captions of metadata.jsonl in the folder
    class_images: Path | None = None
    class_prompt: str | None = None
    square: bool = False  # crop to the square, not to 40 shapes

    def __post_init__(self) -> None:
        if (self.class_images is None) != (self.class_prompt is None):
            raise ConfigError("`class_images` and `class_prompt` go together; give both or none")
        if self.prompt is None and not (self.images / METADATA).is_file():
            raise ConfigError(
                f"{self.images} has no {METADATA} with a caption for each picture; write one, or "
                "give one `prompt` for all"
            )

    @property
    def images_per_sample(self) -> int:
        """2 with class pictures: each picture is trained on together with one of them."""
        return 1 if self.class_images is None else 2

    def job(
        self, out: str | Path, model: str, settings: FinetuneSettings, options: JobOptions
    ) -> Job:
        """The training of `model` on these pictures."""
        return Job(
            model=model,
            out=Path(out),
            settings=settings,
            options=options,
            images_per_sample=self.images_per_sample,
        )


def train_on_pictures(
    pictures: Pictures,
    job: Job,
    base: Base,
    *,
    asked: Mapping[str, Any],
    adapt: Callable[[PixArtTransformer], None],
    write: Callable[[dict[str, Tensor]], None],
    progress: Progress,
) -> None:
    """Encode the pictures, let the encoders go, adapt the model, train and write.

    `adapt` chooses what learns. `asked` is what must be the same to resume. Raises ConfigError,
    DataError or CheckpointError, one line.
    """
    instances, of_class = _pictures(pictures)
    with start_ranks(job.options.device) as ranks:
        job.run_settings(ranks)  # refuses what cannot be, before minutes of encoding
        source, null = _encode(
            pictures, job, base, instances, of_class, ranks.device, on_first(ranks, progress)
        )
        model = base.load(ranks.device)
        adapt(model)
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
        ids = RankIds(_sampler(pictures, job, source), ranks.rank, ranks.num_ranks)
        train_and_write(
            job,
            objective,
            Batches(source, ids, seed=job.options.seed),
            ranks,
            identity={"asked": asked, "data": source.identity},
            progress=progress,
            write=write,
        )


def asked_of_pictures(verb: str, pictures: Pictures, job: Job) -> dict[str, Any]:
    """What made the result, as plain values."""
    return {
        "made_by": f"pixart-rt finetune {verb}",
        "model": job.model,
        "prompt": pictures.prompt,
        "class_prompt": pictures.class_prompt,
        "seed": job.options.seed,
        "settings": asdict(job.settings),
    }


def _pictures(given: Pictures) -> tuple[list[Picture], list[Picture]]:
    if given.prompt is None:
        instances = captioned_pictures(given.images)
    else:
        instances = pictures_of(given.images, given.prompt)
    if given.class_images is None or given.class_prompt is None:
        return instances, []
    return instances, pictures_of(given.class_images, given.class_prompt)


def _encode(
    pictures: Pictures,
    job: Job,
    base: Base,
    instances: list[Picture],
    of_class: list[Picture],
    device: torch.device,
    progress: Progress,
) -> tuple[InstanceSource, NullText]:
    """The features of all pictures and captions, and of no caption. The encoders are freed."""
    progress("loading the encoders", 0, 1)
    config, settings = base.checkpoint.config, job.settings
    encoder = FeatureEncoder.open(
        EncoderConfig(
            model=job.model,
            text_precision=usual_text_precision(device),
            max_text_tokens=config.max_text_tokens,
        ),
        device,
    )
    source = encode_instances(
        encoder,
        bucket_table(config.resolution, square=pictures.square),
        instances,
        of_class,
        repeats=settings.batch,
        progress=progress,
    )
    if settings.text_dropout:
        return source, null_of(base.checkpoint, source.empty_prompt)
    shape = config.max_text_tokens, config.caption_channels
    return source, NullText(torch.zeros(shape), None)  # never read: no caption is dropped


@torch.no_grad()
def _projected(
    source: InstanceSource, null: NullText, model: PixArtTransformer
) -> tuple[InstanceSource, NullText]:
    """Both through the caption projection, on the model's device."""

    def projection(embeds: Tensor) -> Tensor:
        return model.y_proj(embeds.to(model.x_embedder.weight.device))

    embeds = projection(null.embeds[None].float())[0]
    return source.projected(projection), replace(null, embeds=embeds)


def _sampler(pictures: Pictures, job: Job, source: InstanceSource) -> BucketSampler:
    """Steps of exactly `batch` images whatever their shape, or of as many pairs."""
    tokens, batch = [1] * len(source.buckets), job.settings.batch
    if pictures.class_images is None:
        return BucketSampler(
            source.bucket_of, tokens, token_budget=batch, multiple=batch, seed=job.options.seed
        )
    return PairedSampler(
        source.bucket_of,
        source.num_instances,
        tokens,
        token_budget=2 * batch,
        multiple=2 * batch,
        seed=job.options.seed,
    )
