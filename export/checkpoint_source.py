"""Where a build's weights come from: `tiny`, `xl-random`, a folder, a .pth or the hub.

A source gives each component's module in the precision asked. Every file is opened, checked and
read once in a build; modules of another precision are converted from the mapped tensors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from pixart_rt.bundle import MANIFEST, sha256
from pixart_rt.checkpoints.controlnet import load_controlnet, read_controlnet
from pixart_rt.checkpoints.hub import locate
from pixart_rt.checkpoints.tensors import TensorFolder
from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
)
from pixart_rt.config import COMPONENTS, RANDOM_XL, CfgNull, ModelConfig
from pixart_rt.errors import BuildError, CheckpointError, ConfigError
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.text_kv import TextSide
from pixart_rt.model.tokenizer import PromptTokenizer
from pixart_rt.model.transformer import Modulator, PixArtTransformer
from pixart_rt.model.vae import SD_VAE, read_vae, read_vae_config, vae_from_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

RANDOM_SEED = 0
_FOLDERS = {"text_encoder": "text_encoder", "vae_decoder": "vae"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A pipeline to build from. `folder` is None for random weights and for a lone transformer."""

    name: str
    config: ModelConfig
    folder: Path | None
    transformer_path: Path | None
    weights_sha256: str
    controlnet_path: Path | None = None
    controlnet: ControlNetConfig | None = None  # of the file at that path
    _read: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        """The result of `read`, which is called at the first use of `name` only."""
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    @property
    def components(self) -> tuple[str, ...]:
        """The components this source can give."""
        if self.folder is None:
            random = self.transformer_path is None
            return ("transformer", "vae_decoder") if random else ("transformer",)
        present = [name for name, sub in _FOLDERS.items() if (self.folder / sub).is_dir()]
        return ("transformer", *present)

    def transformer(self, dtype: torch.dtype) -> PixArtTransformer:
        """The transformer with its modulator and, if requested, a ControlNet; eval mode."""
        if self.transformer_path is None:
            return random_transformer(self.config, dtype)
        if self.controlnet_path is None:
            return load_transformer(self._checkpoint_in(dtype), dtype)
        path = self.controlnet_path
        controlnet = self._once("controlnet", lambda: read_controlnet(path, self.config))
        return load_controlnet(controlnet, self._checkpoint_in(dtype), dtype)

    def modulator(self) -> Modulator:
        """The modulator alone, float32."""
        if self.transformer_path is not None:
            return load_transformer(self.checkpoint(), torch.float32).modulator
        with torch.device("meta"):
            modulator = Modulator(self.config)
        return _fill(modulator, "modulator.", torch.float32)

    def text_side(self, dtype: torch.dtype) -> TextSide:
        """The caption projection and the cross-attention weights."""
        if self.transformer_path is not None:
            return TextSide.of(self.transformer(dtype))
        with torch.device("meta"):
            side = TextSide(self.config)
        return _fill(side, "", dtype)

    def empty_prompt(self) -> dict[str, Tensor]:
        """The text encoder's inputs for the empty prompt, at the model's full text length."""
        assert self.folder is not None
        folder, length = self.folder / "tokenizer", self.config.max_text_tokens
        tokens = self._once("empty_prompt", lambda: PromptTokenizer(folder, length)([""]))
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def _checkpoint_in(self, dtype: torch.dtype) -> TransformerCheckpoint:
        """The checkpoint in `dtype`, in memory of its own: a module's weights may be changed."""
        found = self.checkpoint()
        state = {name: tensor.to(dtype, copy=True) for name, tensor in found.state.items()}
        return replace(found, state=state)

    def checkpoint(self) -> TransformerCheckpoint:
        """The transformer's tensors as the files hold them."""
        path = self.transformer_path
        assert path is not None

        def read() -> TransformerCheckpoint:
            found = read_transformer(
                path,
                heads=self.config.num_heads,
                sample_size=self.config.sample_size,
                max_text_tokens=self.config.max_text_tokens,
            )
            return replace(found, config=self.config)

        checkpoint: TransformerCheckpoint = self._once("transformer", read)
        return checkpoint

    def check_fits(self, components: tuple[str, ...]) -> None:
        """Refuse components that are missing or do not fit each other, before any work.

        Raises BuildError for a missing one, CheckpointError for widths that differ.
        """
        missing = [name for name in components if name not in self.components]
        if missing:
            raise BuildError(
                f"{self.name} has no {', '.join(missing)}, only {', '.join(self.components)}; name "
                "what to build with --components, or give a whole pipeline folder"
            )
        if "text_encoder" in components:
            assert self.folder is not None
            if not (self.folder / "tokenizer").is_dir():
                raise CheckpointError(f"{self.folder} has a text encoder but no tokenizer folder")
            self._check_width("text encoder", self.text_config().d_model, "caption_channels")
        if "vae_decoder" in components:
            self._check_width("VAE", self.vae_config()["latent_channels"], "in_channels")

    def check_readable(self, components: tuple[str, ...]) -> None:
        """Read what `check_fits` left unread because its libraries take seconds to import.

        Raises CheckpointError, before any work, for a VAE or a tokenizer that cannot be read.
        """
        if "vae_decoder" in components:
            self.whole_vae_config()
        if "text_encoder" in components:
            self.empty_prompt()

    def _check_width(self, what: str, found: int, setting: str) -> None:
        expected = getattr(self.config, setting)
        if found != expected:
            raise CheckpointError(
                f"the {what} of {self.name} has {found} channels, its transformer takes {expected} "
                f"({setting}); they are of different models"
            )

    def text_config(self) -> T5Config:
        assert self.folder is not None
        return T5Config.read(self.folder / "text_encoder")

    def text_encoder(self, dtype: torch.dtype, start: int, stop: int) -> T5Encoder:
        """Layers start to stop of the text encoder."""
        assert self.folder is not None
        folder = self.folder / "text_encoder"
        tensors = self._once("text_encoder", lambda: TensorFolder(folder))
        return read_text_encoder(folder, dtype, start, stop, tensors=tensors)

    def vae(self) -> AutoencoderKL:
        """The autoencoder in float32, the caller's own copy."""
        vae: AutoencoderKL = copy.deepcopy(self._once("vae", self._read_vae))
        return vae

    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration as its file has it, which needs no diffusers."""
        if self.folder is None:
            return dict(SD_VAE)
        folder = self.folder / "vae"
        return dict(self._once("vae_config", lambda: read_vae_config(folder)))

    def whole_vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration with diffusers' defaults; reads its weights too."""
        config = self._once("vae", self._read_vae).config
        return {name: value for name, value in config.items() if not name.startswith("_")}

    def _read_vae(self) -> AutoencoderKL:
        if self.folder is None:
            with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
                torch.manual_seed(RANDOM_SEED)
                return vae_from_config(SD_VAE)
        return read_vae(self.folder / "vae")


def open_source(
    model: str,
    resolution: int,
    *,
    components: tuple[str, ...] = COMPONENTS,
    heads: int | None = None,
    sample_size: int | None = None,
    max_text_tokens: int | None = None,
    cfg_null: CfgNull | None = None,
    controlnet: Path | None = None,
) -> Source:
    """Find `model`, read its configuration and check that it fits the resolution.

    Raises CheckpointError when it cannot be found or read, ConfigError for a wrong resolution.
    """
    if model == "xl-random" and controlnet is not None:
        raise ConfigError(
            f"--controlnet {controlnet} is not supported with xl-random, which no ControlNet was "
            "trained for; name the model it was trained for"
        )
    if model == "xl-random":
        config = _with_null(RANDOM_XL[resolution], cfg_null)
        label = f"xl-random:{resolution}:{RANDOM_SEED}"
        return Source(name=model, config=config, folder=None, transformer_path=None,
                      weights_sha256=hashlib.sha256(label.encode()).hexdigest())  # fmt: skip
    subfolders = [sub for name, sub in _FOLDERS.items() if name in components]
    path = locate(model, ["transformer", "tokenizer", "scheduler", *subfolders])
    folder, transformer = _pipeline_parts(path, model, resolution)
    found = read_transformer(
        transformer, heads=heads, sample_size=sample_size, max_text_tokens=max_text_tokens
    )
    config = _with_null(found.config, cfg_null)
    if config.cfg_null is CfgNull.Y_EMBEDDING and found.y_embedding is None:
        raise ConfigError(
            f"--cfg-null {CfgNull.Y_EMBEDDING} was requested, but {transformer} has no "
            f"y_embedding; convert the original .pth, or use {CfgNull.EMPTY_PROMPT}"
        )
    if config.resolution != resolution:
        raise ConfigError(
            f"--res {resolution} was requested, but {model} is a {config.resolution} px model "
            f"(sample_size {config.sample_size}); use --res {config.resolution} or another --model"
        )
    weights = _hash_weights(folder, transformer)
    read: dict[str, Any] = {"transformer": replace(found, config=config)}
    settings = None
    if controlnet is not None:
        read["controlnet"] = read_controlnet(controlnet, config)
        settings = read["controlnet"].config
        weights = hashlib.sha256(
            f"{weights} {_hash_weights(None, controlnet)}".encode()
        ).hexdigest()
    return Source(
        name=model,
        config=config,
        folder=folder,
        transformer_path=transformer,
        weights_sha256=weights,
        controlnet_path=controlnet,
        controlnet=settings,
        _read=read,
    )


def random_transformer(config: ModelConfig, dtype: torch.dtype) -> PixArtTransformer:
    """A transformer with seeded random weights, made in `dtype` without a float32 copy."""
    with torch.device("meta"):
        model = PixArtTransformer(config)
    return _fill(model, "", dtype)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _fill(module: ModuleT, prefix: str, dtype: torch.dtype) -> ModuleT:
    """Give a meta module its random weights, each seeded by its full name.

    Linear weights have variance 1/fan_in, tables 1/width, so activations stay near 1.
    """
    state = {}
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(
            RANDOM_SEED + zlib.crc32((prefix + name).encode())
        )
        scale = 0.02 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[-1])
        weight = torch.empty(parameter.shape).normal_(std=scale, generator=generator)
        state[name] = weight.to(dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _with_null(config: ModelConfig, cfg_null: CfgNull | None) -> ModelConfig:
    return config if cfg_null is None else replace(config, cfg_null=cfg_null)


def _pipeline_parts(path: Path, model: str, resolution: int) -> tuple[Path | None, Path]:
    """The pipeline folder, if it is one, and the transformer's own path."""
    if path.is_file() or not (path / "model_index.json").is_file():
        return None, path
    if model == "tiny" and resolution == 256:
        return path, path / "transformer_256"
    return path, path  # read_transformer learns the family from the pipeline's index


def _hash_weights(folder: Path | None, transformer: Path) -> str:
    """One hash over every weight and configuration file that a build may read, behind links too.

    Nothing else in the folder counts: a bundle that was built into it would change its own key.
    """
    if folder is None:
        paths = [transformer] if transformer.is_file() else _files_below(transformer)
    else:
        model = "transformer" if transformer == folder else transformer.name
        names = (model, *_FOLDERS.values(), "tokenizer", "scheduler")
        found = [path for name in names for path in _files_below(folder / name)]
        paths = [folder / "model_index.json", *found]
    root = folder or transformer
    digest = hashlib.sha256(str(transformer.name).encode())
    for path in paths:
        digest.update(json.dumps([path.relative_to(root).as_posix(), sha256(path)]).encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """The files of a component in order. Links are followed, each folder once: links may circle.

    A bundle inside is none of the component's files.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        bundle = here != folder and (here / MANIFEST).is_file()
        if bundle or here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        folders.sort()
        found += [here / name for name in sorted(files) if (here / name).is_file()]
    return found
