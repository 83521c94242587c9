"""The model that a forecast is of: its configurations by component, and its bundle if it is built.

Published PixArt models are known by name, so a plan for them needs neither files nor network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
from pixart_rt.model.vae import SD_VAE

TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model and its components' configurations; None for an engine."""

    name: str
    config: ModelConfig
    configs: dict[str, dict[str, Any] | None]
    bundle: tuple[Path, Manifest] | None = None


KNOWN: dict[str, ModelConfig] = {  # every one with T5-XXL and Stable Diffusion's VAE
    **{name: RANDOM_XL[resolution] for resolution, name in PUBLISHED.items()},
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": XL_2_1024_MS,
    "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": XL_2_512,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": SIGMA_XL_2_1024,
}


def find_model(name: str, resolution: int) -> Model:
    """A model by name (tiny, xl-random, a published id), a diffusers folder or a bundle.

    Raises ConfigError for anything else, CheckpointError for configurations that cannot be read.
    """
    folder = TINY if name == "tiny" else Path(name)
    if name == "xl-random":
        found = _model(name, RANDOM_XL[resolution], None, SD_VAE)
    elif name in KNOWN:
        found = _model(name, KNOWN[name], T5_XXL, SD_VAE)
    elif (folder / MANIFEST).is_file():
        found = bundle_model(folder, Manifest.read(folder))
    elif (folder / "transformer" / "config.json").is_file():
        part = "transformer_256" if name == "tiny" and resolution == 256 else "transformer"
        found = _folder_model(name, folder, part)
    else:
        raise ConfigError(
            f"--model {name} is neither a folder with transformer/config.json nor a name whose "
            f"sizes are known: tiny, xl-random, {', '.join(KNOWN)}"
        )
    if found.config.resolution != resolution:
        raise ConfigError(
            f"--res {resolution} was asked, but {name} is a {found.config.resolution} px model; "
            f"use --res {found.config.resolution}"
        )
    return found


def bundle_model(folder: Path, manifest: Manifest) -> Model:
    """The model of a bundle. Raises ConfigError where its memory is not known."""
    if manifest.control is not None:
        raise ConfigError(
            f"the memory of {folder} was asked, but it has a ControlNet, whose memory is not "
            "predicted; use a bundle without one"
        )
    configs: dict[str, dict[str, Any] | None] = {}
    for name, entry in manifest.components.items():
        in_torch = entry.backend.startswith("torch")
        if not in_torch and entry.memory is None:
            raise ConfigError(
                f"the memory of {folder} was asked, but its {name} in {entry.backend} was built "
                "before builds measured that; build it again"
            )
        configs[name] = _read(folder / name / "config.json") if in_torch else None
    return Model(
        name=str(folder), config=manifest.config, configs=configs, bundle=(folder, manifest)
    )


def _model(name: str, config: ModelConfig, t5: T5Config | None, vae: dict[str, Any]) -> Model:
    text = {} if t5 is None else {"text_encoder": asdict(t5)}
    configs: dict[str, dict[str, Any] | None] = {
        **text,
        "transformer": config.to_dict(),
        "vae_decoder": vae,
    }
    return Model(name=name, config=config, configs=configs)


def _folder_model(name: str, folder: Path, transformer: str) -> Model:
    index = folder / "model_index.json"
    family = str(_read(index).get("_class_name")) if index.is_file() else ""
    config = config_from_json(
        _read(folder / transformer / "config.json"),
        Flags(),
        {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}.get(family),
        str(folder / transformer),
    )
    text = folder / "text_encoder"
    t5 = T5Config.read(text) if text.is_dir() else None
    return _model(name, config, t5, _read(folder / "vae" / "config.json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give another --model") from error
    return values
