"""What the verbs of `pixart-rt finetune` share: pictures in, a trained objective, its result out.

    pictures encoded once -> encoders let go -> model adapted -> trained -> written, whole or absent

OUT.run holds the log and, while it trains, checkpoints; the same command goes on from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pixart_rt.batch import Batch
from pixart_rt.bundle import sha256
from pixart_rt.config import Kernels, ModelConfig, Precision
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.data.folder import METADATA
from pixart_rt.data.instances import (
    InstanceSource,
    Picture,
    captioned_pictures,
    empty_prompt,
    encode_instances,
    pictures_of,
)
from pixart_rt.errors import ConfigError
from pixart_rt.model.checkpoint import TransformerCheckpoint, load_transformer, read_transformer
from pixart_rt.model.locate import locate, transformer_path
from pixart_rt.model.pipeline_folder import COMPONENTS, check_target, is_pipeline, write_model
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.checkpoints import FOLDER
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dreambooth import DreamBoothObjective
from pixart_rt.training.dropout import NullText, null_text
from pixart_rt.training.finetune_settings import FinetuneSettings, LoraSettings
from pixart_rt.training.log import Place
from pixart_rt.training.lora import add_lora, lora_state, save_lora
from pixart_rt.training.pairs import PairedSampler
from pixart_rt.training.ranks import Ranks, start_ranks
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, RunSettings
from pixart_rt.training.sampler import BucketSampler
from pixart_rt.training.trainer import StepResult, Trainer

Progress = Callable[[str, int, int], None]
LOG = (Place.CONSOLE, Place.JSONL)
LINES = 20  # of the log in a run
SAVES = 3  # checkpoints in a run, of which the last is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a verb was asked. Without `lora` all weights are trained."""

    images: Path
    model: str
    out: Path
    prompt: str | None
    class_images: Path | None
    class_prompt: str | None
    settings: FinetuneSettings
    lora: LoraSettings | None
    res: int | None
    square: bool
    seed: int
    device: str | None
    precision: Precision | None
    optimizer: OptimizerKind
    checkpointing: Checkpointing
    micro_batches: int | None
    force: bool

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
    check_target(request.out, request.force)
    instances, of_class = _pictures(request)
    folder = locate(request.model, COMPONENTS)
    checkpoint = read_transformer(transformer_path(folder, request.model, request.res))
    if request.res is not None and checkpoint.config.resolution != request.res:
        raise ConfigError(
            f"--res {request.res} was asked, but {request.model} is a "
            f"{checkpoint.config.resolution} px model"
        )
    with start_ranks(request.device) as ranks:
        if not ranks.is_first:
            progress = silent
        source, null = _encode(request, checkpoint, instances, of_class, ranks.device, progress)
        model = load_transformer(checkpoint, torch.float32)
        _choose_what_learns(model, request)
        projected = not any(each.requires_grad for each in model.y_proj.parameters())
        if projected:
            source, null = source.projected(model.y_proj), _projected(null, model)
        model.to(ranks.device)
        model.use(Kernels.FUSED if ranks.device.type == "cuda" else Kernels.REFERENCE)
        objective = DreamBoothObjective(
            model,
            GaussianDiffusion(),
            null,
            num_instances=source.num_instances if of_class else None,
            prior_weight=request.settings.prior_weight,
            text_dropout=request.settings.text_dropout,
            projected=projected,
        )
        run = request.out.with_name(f"{request.out.name}.run")
        feed = _Feed(source, _sampler(request, source), ranks, request.seed)
        identity = {
            "asked": _asked(request),
            "pictures": [sha256(each.path) for each in (*instances, *of_class)],
        }
        settings = _run_settings(request, ranks)
        trainer = Shown(
            objective, feed, settings, run, ranks, identity=identity, log=LOG, progress=progress
        )
        trainer.run()
        if ranks.is_first:
            _write(request, checkpoint, folder, model)
            forget_checkpoints(run)
        ranks.barrier()
        return ranks.is_first


def silent(name: str, done: int, total: int) -> None:
    """The progress of ranks other than the first."""


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
    checkpoint: TransformerCheckpoint,
    instances: list[Picture],
    of_class: list[Picture],
    device: torch.device,
    progress: Progress,
) -> tuple[InstanceSource, NullText]:
    """The features of all pictures and captions, and of no caption. The encoders are let go."""
    progress("loading the encoders", 0, 1)
    config: ModelConfig = checkpoint.config
    encoder = FeatureEncoder.open(
        EncoderConfig(
            model=request.model,
            text_precision=Precision.BF16 if device.type == "cuda" else Precision.FP32,
            max_text_tokens=config.max_text_tokens,
        ),
        device,
    )
    source = encode_instances(
        encoder,
        bucket_table(config.resolution, square=request.square),
        instances,
        of_class,
        repeats=request.settings.batch,
        progress=progress,
    )
    null = null_text(
        config.cfg_null,
        empty_prompt=empty_prompt(encoder),
        y_embedding=checkpoint.y_embedding,
    )
    return source, null


def _choose_what_learns(model: PixArtTransformer, request: Request) -> None:
    if request.lora is not None:
        add_lora(model, request.lora, request.seed)
    else:
        model.requires_grad_(True)
        model.y_proj.requires_grad_(request.settings.train_captions)


@torch.no_grad()
def _projected(null: NullText, model: PixArtTransformer) -> NullText:
    return replace(null, embeds=model.y_proj(null.embeds[None].float())[0])


def _sampler(request: Request, source: InstanceSource) -> BucketSampler:
    """Steps of exactly `batch` images whatever their shape, or of as many pairs."""
    tokens, batch = [1] * len(source.buckets), request.settings.batch
    if request.class_images is None:
        return BucketSampler(
            source.bucket_of, tokens, token_budget=batch, multiple=batch, seed=request.seed
        )
    return PairedSampler(
        source.bucket_of,
        source.num_instances,
        tokens,
        token_budget=2 * batch,
        multiple=2 * batch,
        seed=request.seed,
    )


def _run_settings(request: Request, ranks: Ranks) -> RunSettings:
    settings = request.settings
    return RunSettings(
        steps=settings.steps,
        lr=settings.lr,
        optimizer=request.optimizer,
        weight_decay=settings.weight_decay,
        eps=None if request.optimizer is OptimizerKind.CAME else settings.eps,  # it has two
        clip_norm=settings.clip_norm,
        ema_decay=None,  # of 300 steps an average is mostly the start
        precision=request.precision or usual_precision(ranks.device),
        micro_batches=request.micro_batches or ranks.num_ranks,
        checkpointing=request.checkpointing,
        seed=request.seed,
        log_every=-(-settings.steps // LINES),
        save_every=-(-settings.steps // SAVES),
        keep=1,
    )


def usual_precision(device: torch.device) -> Precision:
    if device.type != "cuda":
        return Precision.FP32
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return Precision.BF16 if ampere else Precision.FP16


def _asked(request: Request) -> dict[str, Any]:
    """What made the result, as plain values."""
    return {
        "made_by": f"pixart-rt finetune {'dreambooth' if request.lora is None else 'lora'}",
        "model": request.model,
        "prompt": request.prompt,
        "class_prompt": request.class_prompt,
        "seed": request.seed,
        "settings": asdict(request.settings),
        "lora": None if request.lora is None else asdict(request.lora),
    }


def _write(
    request: Request, checkpoint: TransformerCheckpoint, folder: Path, model: PixArtTransformer
) -> None:
    origin = _asked(request)
    if checkpoint.origin is not None:
        origin["base_origin"] = checkpoint.origin
    if request.lora is not None:
        save_lora(request.out, lora_state(model), request.lora, base=request.model, origin=origin)
        return
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_model(
        replace(checkpoint, state=state, origin=origin),
        request.out,
        pipeline=folder if is_pipeline(folder) else None,
    )


def forget_checkpoints(run: Path) -> None:
    """Remove what the run needed to go on; its log stays."""
    shutil.rmtree(run / FOLDER)


class _Feed:
    """The steps of one rank, from memory."""

    def __init__(
        self, source: InstanceSource, sampler: BucketSampler, ranks: Ranks, seed: int
    ) -> None:
        self.source, self.sampler, self.ranks, self.seed = source, sampler, ranks, seed

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            ids = self.sampler.ids(step, self.ranks.rank, self.ranks.num_ranks).tolist()
            yield self.source.finish(self.source.load(ids, seed=self.seed, step=step))


class Shown(Trainer):
    """A trainer that tells how far it is."""

    def __init__(self, *arguments: Any, progress: Progress, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._progress = progress

    def observe(self, result: StepResult, batch: Batch) -> None:
        super().observe(result, batch)
        self._progress("training", self.done, self.settings.steps)
