"""The frozen encoders of the training data: pictures to VAE moments, captions to T5 features.

Captions are cleaned and tokenized as for generation (model/tokenizer.py). The text encoder sees a
batch padded to its longest caption instead of the model's maximum; masked, that changes rounding
only. B images, H×W pixels, C latent channels, h×w = H/8×W/8, E text width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints.configs import DEFAULT_TEXT_TOKENS
from pixart_rt.checkpoints.hub import locate
from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.checkpoints.transformer import FAMILY_TEXT_TOKENS
from pixart_rt.config import Precision
from pixart_rt.errors import CheckpointError, DataError
from pixart_rt.files import read_json
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_encoder import T5Encoder
from pixart_rt.model.tokenizer import PromptTokenizer
from pixart_rt.model.vae import read_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FOLDERS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which encoders, and how they run. Equal configs give features that may lie in one store."""

    model: str  # tiny, a diffusers pipeline folder or a hub id
    precision: Precision = Precision.FP32  # of the VAE; its features are kept in float16
    text_precision: Precision = Precision.FP32
    max_text_tokens: int | None = None  # None: by the pipeline's family, 120 or 300


def usual_text_precision(device: torch.device) -> Precision:
    """Of the text encoder: bf16 on a GPU (in fp16 T5 overflows), else float32."""
    return Precision.BF16 if device.type == "cuda" else Precision.FP32


@dataclass(slots=True)
class Stopwatch:
    """Seconds by kind of work, devices waited for."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start


class FeatureEncoder:
    """Runs VAE and text encoder on one device. `identity` says what the features depend on."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: T5Encoder,
        tokenizer: PromptTokenizer,
        device: torch.device,
        identity: dict[str, str],
    ) -> None:
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.device, self.identity = device, identity
        self.clock = Stopwatch(device)

    @classmethod
    def open(cls, config: EncoderConfig, device: torch.device) -> FeatureEncoder:
        """Find and load the encoders. Raises CheckpointError if one is missing."""
        folder = locate(config.model, FOLDERS)
        missing = [name for name in FOLDERS if not (folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{config.model} has no {', '.join(missing)}; features need a whole pipeline "
                "folder, as diffusers writes it, or --model tiny"
            )
        dtype, text_dtype = DTYPES[config.precision], DTYPES[config.text_precision]
        tokens = config.max_text_tokens or family_text_tokens(folder)
        identity = {
            "vae_sha256": hash_folder(folder / "vae"),
            "text_encoder_sha256": hash_folder(folder / "text_encoder"),
            "tokenizer_sha256": hash_folder(folder / "tokenizer"),
            "precision": str(config.precision),
            "text_precision": str(config.text_precision),
        }
        return cls(
            nn.Module.to(read_vae(folder / "vae"), device, dtype),  # diffusers' own `to` warns
            read_text_encoder(folder / "text_encoder", text_dtype).to(device),
            PromptTokenizer(folder / "tokenizer", tokens),
            device,
            identity,
        )

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def text_width(self) -> int:
        return self.text_encoder.config.d_model

    @property
    def max_text_tokens(self) -> int:
        return self.tokenizer.max_tokens

    @torch.no_grad()
    def moments(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Pictures of one size, each [H, W, 3] uint8, to means and deviations.

        Returns [B, 2, C, h, w] float32 on the CPU, not scaled. Raises DataError where half
        precision overflowed.
        """
        with self.clock.measure("vae"):
            stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
            images = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
            deviation = (0.5 * posterior.logvar.float()).exp()
            found = torch.stack([posterior.mean.float(), deviation], 1).cpu()
        if not found.isfinite().all():
            raise DataError("the VAE's features are not finite; encode with --precision fp32")
        return found

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """Features of captions without padding, and how many tokens of each were cut off.

        Each is [n, E] bfloat16 on the CPU, n tokens with the end token. Raises DataError where
        half precision overflowed.
        """
        # Of a folder of classes all captions are the empty prompt, which is encoded once.
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        with self.clock.measure("text"):
            tokens = self.tokenizer(list(row_of))
            counts = tokens.attention_mask.sum(1).tolist()
            longest = max(counts)
            ids, mask = (
                each[:, :longest].to(self.device)
                for each in (tokens.input_ids, tokens.attention_mask)
            )
            embeds = self.text_encoder(ids, mask).to("cpu", torch.bfloat16)
        if not embeds.isfinite().all():
            raise DataError("the text features are not finite; encode with --text-precision bf16")
        rows = [row_of[caption] for caption in captions]
        return [embeds[row, : counts[row]] for row in rows], [tokens.num_cut[row] for row in rows]


def family_text_tokens(folder: Path) -> int:
    """The prompt length of a pipeline folder: its transformer's, else its family's (120, 300)."""
    stored = _read_json(folder / "transformer" / "config.json").get("_pixart_rt_max_text_tokens")
    family = _read_json(folder / "model_index.json").get("_class_name")
    by_family = FAMILY_TEXT_TOKENS.get(str(family), DEFAULT_TEXT_TOKENS)
    return stored if isinstance(stored, int) else by_family


def hash_folder(folder: Path) -> str:
    """One hash over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(json.dumps([path.relative_to(folder).as_posix(), sha256(path)]).encode())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    return values if isinstance(values, dict) else {}
