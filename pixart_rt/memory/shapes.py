"""The sizes of a pipeline that its memory follows from, read from configurations, never weights.

The published PixArt models are known by name, so a plan for them needs neither files nor network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixart_rt
from pixart_rt.bundle import MANIFEST, Manifest
from pixart_rt.checkpoints.configs import Flags, config_from_json
from pixart_rt.config import (
    PUBLISHED,
    RANDOM_XL,
    SIGMA_XL_2_1024,
    XL_2_512,
    XL_2_1024_MS,
    ModelConfig,
)
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.model.text_encoder import T5_XXL, T5Config

TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeShape:
    """The decoder of an AutoencoderKL. The default is Stable Diffusion's, PixArt's own."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # from full resolution down to the latents'
    resnets: int = 3  # per resolution: layers_per_block + 1
    latent_channels: int = 4
    mid_attention: bool = True
    post_quant_conv: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VaeShape:
        """From the values of a diffusers AutoencoderKL's config.json; its defaults where silent."""
        return cls(
            channels=tuple(values.get("block_out_channels", (64,))),
            resnets=int(values.get("layers_per_block", 1)) + 1,
            latent_channels=int(values.get("latent_channels", 4)),
            mid_attention=bool(values.get("mid_block_add_attention", True)),
            post_quant_conv=bool(values.get("use_post_quant_conv", True)),
        )


SD_VAE_SHAPE = VaeShape()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A pipeline's three components. `text` is None where there is no text encoder."""

    name: str
    config: ModelConfig
    text: T5Config | None
    vae: VaeShape


KNOWN: dict[str, ModelConfig] = {  # every one with T5-XXL and Stable Diffusion's VAE
    **{name: RANDOM_XL[resolution] for resolution, name in PUBLISHED.items()},
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": XL_2_1024_MS,
    "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": XL_2_512,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": SIGMA_XL_2_1024,
}


def find_shape(model: str, resolution: int) -> ModelShape:
    """The shape of a model by name (tiny, xl-random, a published id) or of a folder's configs.

    The folder is a diffusers pipeline or a bundle of PyTorch components. Raises ConfigError for a
    name that is none of these, CheckpointError for a folder whose configs cannot be read.
    """
    if model == "xl-random":
        return ModelShape(name=model, config=RANDOM_XL[resolution], text=None, vae=SD_VAE_SHAPE)
    if model in KNOWN:
        shape = ModelShape(name=model, config=KNOWN[model], text=T5_XXL, vae=SD_VAE_SHAPE)
        return _at(shape, resolution)
    folder = TINY if model == "tiny" else Path(model)
    if (folder / MANIFEST).is_file():
        return _at(bundle_shape(folder, Manifest.read(folder)), resolution)
    if not (folder / "transformer" / "config.json").is_file():
        raise ConfigError(
            f"--model {model} is neither a folder with transformer/config.json nor a name whose "
            f"sizes are known: tiny, xl-random, {', '.join(KNOWN)}"
        )
    part = "transformer_256" if model == "tiny" and resolution == 256 else "transformer"
    return _at(_folder_shape(model, folder, part), resolution)


def bundle_shape(folder: Path, manifest: Manifest) -> ModelShape:
    """The shape of a bundle whose text encoder and VAE, where it has them, run in PyTorch.

    Raises ConfigError for engines, whose memory their compiler decided.
    """
    engines = [
        f"{name} in {entry.backend}"
        for name, entry in manifest.components.items()
        if not entry.backend.startswith("torch")
    ]
    if engines:
        raise ConfigError(
            f"{folder} has {', '.join(engines)}: an engine's memory is fixed when it is built and "
            "cannot be predicted; build with --backend torch or torch-compile for a memory plan"
        )
    text = None
    if "text_encoder" in manifest.components:
        text = T5Config.read(folder / "text_encoder")
    vae = VaeShape.from_dict(_read(folder / "vae_decoder" / "config.json"))
    return ModelShape(name=str(folder), config=manifest.config, text=text, vae=vae)


def _folder_shape(model: str, folder: Path, transformer: str) -> ModelShape:
    text = None
    if (folder / "text_encoder").is_dir():
        text = T5Config.read(folder / "text_encoder")
    return ModelShape(
        name=model,
        config=config_from_json(
            _read(folder / transformer / "config.json"),
            Flags(),
            _text_tokens(folder),
            str(folder / transformer),
        ),
        text=text,
        vae=VaeShape.from_dict(_read(folder / "vae" / "config.json")),
    )


def _text_tokens(folder: Path) -> int | None:
    """The prompt length of the pipeline's family, where its index tells the family."""
    path = folder / "model_index.json"
    family = str(_read(path).get("_class_name")) if path.is_file() else ""
    return {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}.get(family)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give another --model") from error
    return values


def _at(shape: ModelShape, resolution: int) -> ModelShape:
    """The shape, checked to be a model of this resolution."""
    if shape.config.resolution != resolution:
        raise ConfigError(
            f"--res {resolution} was asked, but {shape.name} is a {shape.config.resolution} px "
            f"model; use --res {shape.config.resolution}"
        )
    return shape
