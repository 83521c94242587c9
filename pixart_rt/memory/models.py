"""The model that a forecast is of: its configurations by component, and its bundle if it is built.

Published PixArt models are known by name, so a plan for them needs neither files nor network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pixart_rt
from pixart_rt.bundle import MANIFEST, ComponentEntry, Manifest
from pixart_rt.checkpoints.configs import Flags, config_from_json
from pixart_rt.config import (
    PUBLISHED,
    RANDOM_XL,
    SIGMA_XL_2_1024,
    XL_2_512,
    XL_2_1024_MS,
    EngineConfig,
    ModelConfig,
)
from pixart_rt.errors import BundleError, CheckpointError, ConfigError
from pixart_rt.model.component_configs import SD_VAE, T5_XXL, T5Config
from pixart_rt.model.controlnet_config import CONTROLNET

PYTORCH = ("torch", "torch-compile")
TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"
KNOWN: dict[str, ModelConfig] = {  # every one with T5-XXL and Stable Diffusion's VAE
    **{name: RANDOM_XL[resolution] for resolution, name in PUBLISHED.items()},
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": XL_2_1024_MS,
    "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": XL_2_512,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": SIGMA_XL_2_1024,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model, and the config.json of each component; of a bundle, in the form it has there."""

    name: str
    config: ModelConfig
    configs: dict[str, dict[str, Any]]
    bundle: tuple[Path, Manifest] | None = None
    built: EngineConfig | None = None  # what the bundle was built for

    def entry(self, component: str) -> ComponentEntry | None:
        """Its entry in the bundle's manifest."""
        return None if self.bundle is None else self.bundle[1].components.get(component)

    def backend(self, component: str) -> str:
        """What runs it; PyTorch for a model that is not built, "" where there is none."""
        entry = self.entry(component)
        usual = "torch" if component in self.configs else ""
        return usual if entry is None else entry.backend


def find_model(name: str, resolution: int | None) -> Model:
    """A model by name (tiny, xl-random, a published id), a diffusers folder or a bundle.

    resolution: what the model must be of; None for the model's own.
    Raises ConfigError for anything else, CheckpointError for configurations that cannot be read.
    """
    folder = TINY if name == "tiny" else Path(name)
    if name == "xl-random":
        found = _model(name, RANDOM_XL[resolution or 1024], None, SD_VAE)
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
    if resolution not in (None, found.config.resolution):
        raise ConfigError(
            f"--res {resolution} was requested, but {name} is a {found.config.resolution} px "
            f"model; use --res {found.config.resolution}"
        )
    return found


def bundle_model(folder: Path, manifest: Manifest) -> Model:
    """The model of a bundle. Engines have no config.json, and need one only where the build did not
    measure them (format 3): then they are taken to be those of tiny or of the published models.
    """
    tiny = manifest.model.get("name") == "tiny"
    usual = {"text_encoder": asdict(T5_XXL), "vae_decoder": SD_VAE}
    if tiny:
        usual = find_model("tiny", manifest.config.resolution).configs
    control = {} if manifest.controlnet is None else {CONTROLNET: manifest.controlnet}
    usual = {**usual, "transformer": {**manifest.model_config, **control}}
    configs = {
        name: read_json(folder / name / "config.json") if entry.backend in PYTORCH else usual[name]
        for name, entry in manifest.components.items()
    }
    try:
        built = EngineConfig.from_dict(manifest.engine_config)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder} is damaged ({error}); build the bundle again") from error
    return Model(name=str(folder), config=manifest.config, configs=configs,
                 bundle=(folder, manifest), built=built)  # fmt: skip


def _model(name: str, config: ModelConfig, t5: T5Config | None, vae: dict[str, Any]) -> Model:
    text = {} if t5 is None else {"text_encoder": asdict(t5)}
    configs = {**text, "transformer": config.to_dict(), "vae_decoder": vae}
    return Model(name=name, config=config, configs=configs)


def _folder_model(name: str, folder: Path, transformer: str) -> Model:
    index = folder / "model_index.json"
    family = str(read_json(index).get("_class_name")) if index.is_file() else ""
    config = config_from_json(
        read_json(folder / transformer / "config.json"),
        Flags(),
        {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}.get(family),
        str(folder / transformer),
    )
    text = folder / "text_encoder"
    t5 = T5Config.read(text) if text.is_dir() else None
    return _model(name, config, t5, read_json(folder / "vae" / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The values in a configuration. Raises CheckpointError where it cannot be read."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give another --model") from error
    return values
