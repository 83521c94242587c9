"""Per training stage: encode all images once into a store, or at every use while training?

    store   = images * (max(encode, read) + bytes / write)      hours before training, once
    online  = samples * encode, + what reading is slower than   hours added to training
    samples = images * epochs;  encode = 1 / vae + 1 / text     seconds an image

A stage of many epochs is cheaper from a store, one of less than an epoch while training: the store
would encode images that the stage never draws. Hours are of one process and its device; on n of
them both sides shrink alike. Reading a store while training is not counted. (Table 4 of the paper,
which does not count extraction, amounts to 171 epochs of alignment at 256 and 0.44 at 1024.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart_rt.buckets import RESOLUTIONS, VAE_SCALE_FACTOR
from pixart_rt.errors import ConfigError
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.vae import vae_from_config

HOUR = 3600  # seconds


class Choice(StrEnum):
    """Where a stage's features come from."""

    STORE = "store"
    """Extracted once, before training."""
    ONLINE = "online"
    """Encoded whenever they are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What was measured, per second. None where it was not."""

    vae: float  # images through the VAE's encoder
    text: float  # captions through the text encoder
    read: float  # images read and resized
    write_bytes: float
    train: float | None = None  # images through a training step that has its features already

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ConfigError(f"the rate {name} must be more than 0 per second, got {rate}")

    @property
    def encode_seconds(self) -> float:
        """Both encoders on one image."""
        return 1 / self.vae + 1 / self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a training stage needs."""

    images: int
    epochs: float
    resolution: int
    bytes_per_image: float  # in a store; measured, or feature_bytes
    flops_per_image: float | None = None  # of both encoders
    free_bytes: float | None = None  # None: unlimited

    def __post_init__(self) -> None:
        if self.images < 1 or not self.epochs > 0 or not self.bytes_per_image > 0:
            raise ConfigError(
                f"a stage needs images, epochs and bytes of more than 0, got {self.images}, "
                f"{self.epochs} and {self.bytes_per_image}"
            )
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(
                f"resolution {self.resolution} is not supported; choose from {RESOLUTIONS}"
            )

    @property
    def samples(self) -> float:
        """Images drawn, repeats counted."""
        return self.images * self.epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The cheaper source of a stage, and the arithmetic that says so."""

    choice: Choice
    reason: str
    store_hours: float  # before training
    write_hours: float  # of them, writing
    online_hours: float  # added to training
    store_bytes: float
    store_flops: float | None
    online_flops: float | None
    break_even_epochs: float  # a store is cheaper above
    arithmetic: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def decide(stage: Stage, rates: Rates) -> Decision:
    """Compare the hours of both ways; a store that does not fit on the disk is no choice."""
    encode, read = rates.encode_seconds, 1 / rates.read
    write = stage.bytes_per_image / rates.write_bytes
    train = 0.0 if rates.train is None else 1 / rates.train
    stalled = max(
        0.0, read - encode - train
    )  # reading runs at the same time as encoding and training
    per_store, per_online = max(encode, read) + write, encode + stalled
    store_hours = stage.images * per_store / HOUR
    online_hours = stage.samples * per_online / HOUR
    store_bytes = stage.images * stage.bytes_per_image
    fits = stage.free_bytes is None or store_bytes <= stage.free_bytes
    choice = Choice.STORE if fits and store_hours <= online_hours else Choice.ONLINE
    flops = stage.flops_per_image
    return Decision(
        choice=choice,
        reason=_reason(choice, stage, store_hours, online_hours, fits),
        store_hours=store_hours,
        write_hours=stage.images * write / HOUR,
        online_hours=online_hours,
        store_bytes=store_bytes,
        store_flops=None if flops is None else stage.images * flops,
        online_flops=None if flops is None else stage.samples * flops,
        break_even_epochs=per_store / per_online,
        arithmetic=_arithmetic(stage, rates, per_store, per_online, write, train),
    )


def _reason(
    choice: Choice, stage: Stage, store_hours: float, online_hours: float, fits: bool
) -> str:
    hours = f"{store_hours:.3g} h for a store against {online_hours:.3g} h while training"
    if not fits:
        needed = stage.images * stage.bytes_per_image
        return f"a store of {size(needed)} does not fit into {size(stage.free_bytes or 0)}; {hours}"
    if choice is Choice.STORE:
        return f"every image is used {stage.epochs:g} times and encoded once: {hours}"
    if stage.epochs < 1:
        return f"only {stage.epochs:.0%} of the images are used: {hours}"
    return f"{stage.epochs:g} uses of an image do not pay for writing it: {hours}"


def _arithmetic(
    stage: Stage, rates: Rates, per_store: float, per_online: float, write: float, train: float
) -> tuple[str, ...]:
    """Every figure with those it comes from."""
    lines = [
        f"encode = 1/{rates.vae:.4g} + 1/{rates.text:.4g} = {rates.encode_seconds:.4g} s an image",
        f"read = 1/{rates.read:.4g} = {1 / rates.read:.4g} s an image",
        f"write = {size(stage.bytes_per_image)} / {size(rates.write_bytes)}/s = {write:.4g} s",
        f"store: {stage.images} images x (max(encode, read) + write) = {stage.images} x "
        f"{per_store:.4g} s = {stage.images * per_store / HOUR:.4g} h, "
        f"{size(stage.images * stage.bytes_per_image)}",
        f"online: {stage.images} x {stage.epochs:g} epochs x {per_online:.4g} s = "
        f"{stage.samples * per_online / HOUR:.4g} h",
        f"equal at {per_store / per_online:.3g} epochs",
    ]
    if stage.flops_per_image is not None:
        lines.append(
            f"encoders: {stage.flops_per_image / 1e12:.3g} TFLOP an image; store "
            f"{stage.images * stage.flops_per_image / 1e18:.3g} EFLOP, online "
            f"{stage.samples * stage.flops_per_image / 1e18:.3g} EFLOP"
        )
    if train:
        share = rates.encode_seconds / train
        lines.append(f"encoding takes {share:.0%} of a training step ({train:.4g} s an image)")
    return tuple(lines)


def encoder_flops(
    vae_config: dict[str, Any], text: T5Config, resolution: int, num_tokens: int
) -> tuple[float, float]:
    """FLOPs of the VAE's encoder on a square image, of the text encoder on one caption.

    Counted by running both on the meta device: two per multiply-add, in matrix products,
    convolutions and attention.
    """
    with torch.device("meta"):
        vae, encoder = vae_from_config(vae_config), T5Encoder(text)
        image = torch.empty(1, 3, resolution, resolution)
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        mask = torch.ones(1, num_tokens, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as of_vae:
        vae.encode(image)
    with torch.no_grad(), FlopCounterMode(display=False) as of_text:
        encoder(ids, mask)
    return float(of_vae.get_total_flops()), float(of_text.get_total_flops())


def feature_bytes(
    resolution: int, num_tokens: float, *, latent_channels: int = 4, text_width: int = 4096
) -> float:
    """Bytes of an image in a store: means and deviations in float16, text in bfloat16."""
    return 2 * (
        2 * latent_channels * (resolution // VAE_SCALE_FACTOR) ** 2 + num_tokens * text_width
    )


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.3g} minutes" if seconds < HOUR else f"{seconds / HOUR:.3g} hours"
