"""Making a pipeline fit: at the build by what its bundle is, at load by how it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig, Precision, TextPlace
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.inference.vae_tiling import Tiling
from pixart_rt.memory.forecast import Forecast, Setting, forecast
from pixart_rt.memory.shapes import bundle_shape, find_shape
from pixart_rt.memory.tiers import RESERVE, Choice, choices, choose, too_small


def fit_engine(
    model: str, config: EngineConfig, limit: int, *, on_gpu: bool
) -> tuple[EngineConfig, Choice]:
    """The config changed to the best tier whose predicted peak fits `limit` bytes, and that tier.

    Raises ConfigError for components that are not PyTorch's or a model of unknown sizes,
    CapacityError where nothing fits.
    """
    text_backend = config.text_encoder_backend or config.backend
    for backend in (config.backend, text_backend):
        if backend not in ("torch", "torch-compile"):
            raise ConfigError(
                f"--vram was asked with backend {backend}, whose compiler decides what its engines "
                "take; tiers are for --backend torch or torch-compile"
            )
    shape = find_shape(model, config.resolution)
    if "text_encoder" not in config.components:
        shape = replace(shape, text=None)
    base = Setting(
        precision=config.precision,
        text_precision=config.text_precision,
        weights=config.weights,
        text_weights=config.text_weights,
        quality=config.quality,
        batch=config.max_batch,
        fused=on_gpu,
        tiling=Tiling() if config.vae_tiling else None,
    )
    choice = choose(choices(shape, config.resolution, base, limit), limit)
    chosen = choice.tier.setting
    moved = chosen.text_place is TextPlace.OFFLOAD  # compiled modules cannot be
    fitted = replace(
        config,
        weights=chosen.weights,
        text_weights=chosen.text_weights,
        text_place=chosen.text_place,
        vae_tiling=chosen.tiling is not None,
        text_encoder_backend="torch" if moved else config.text_encoder_backend,
    )
    return fitted, choice


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadChoice:
    """What a bundle can still be told when it is loaded."""

    text_place: TextPlace
    max_batch: int
    vae_tiling: bool
    forecast: Forecast


def fit_bundle(
    folder: Path,
    manifest: Manifest,
    limit: int,
    *,
    on_gpu: bool,
    prompts: int = 2,
    vae_tiling: bool = False,
) -> LoadChoice:
    """The first way of running a bundle that fits `limit` bytes.

    In this order: as it was built; fewer images at once, down to one; the text encoder offloaded;
    both again with the VAE in tiles; the text encoder on the CPU, without tiles and with them. Its
    weights and precision are what they are. `prompts`: different ones that will be asked;
    `vae_tiling`: tiles in any case. Raises ConfigError for engines, CapacityError where nothing
    fits.
    """
    shape, engine = bundle_shape(folder, manifest), manifest.engine_config
    built = Setting(
        precision=Precision(engine["precision"]),
        text_precision=Precision(engine["text_precision"]),
        weights=manifest.weights_of("transformer"),
        text_weights=manifest.weights_of("text_encoder"),
        text_place=manifest.text_place,
        quality=manifest.quality,
        fused=on_gpu,
        cached_prompts=prompts,
    )
    largest, resolution = int(engine["max_batch"]), int(engine["resolution"])
    text = manifest.components.get("text_encoder")
    places = [manifest.text_place]
    if text is not None and text.backend == "torch":
        places.append(TextPlace.OFFLOAD)
    if text is not None:
        places.append(TextPlace.CPU)
    batches = sorted({largest, *(1 << k for k in range(largest.bit_length()))}, reverse=True)
    tilings = [Tiling()] if vae_tiling or manifest.vae_tiling else [None, Tiling()]
    ways = [(place, tiling) for tiling in tilings for place in dict.fromkeys(places)]
    ways.sort(key=lambda way: way[0] is TextPlace.CPU and way[0] is not manifest.text_place)
    tried: list[tuple[Setting, Forecast]] = []
    for place, tiling in ways:
        for batch in (each for each in batches if each <= largest):
            setting = replace(built, text_place=place, tiling=tiling, batch=batch)
            predicted = forecast(shape, resolution, setting)
            if predicted.peak + RESERVE <= limit:
                return LoadChoice(
                    text_place=place,
                    max_batch=batch,
                    vae_tiling=tiling is not None,
                    forecast=predicted,
                )
            tried.append((setting, predicted))
    setting, least = min(tried, key=lambda each: each[1].peak)
    tiles = ", the VAE in tiles" if setting.tiling else ""
    name = f"this bundle with text encoder {setting.text_place}{tiles} and {setting.batch} at once"
    raise CapacityError(too_small(limit, least.peak, name))
