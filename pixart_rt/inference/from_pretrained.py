"""The bundle of a checkpoint, found in the user's cache or built there for from_pretrained.

    $XDG_CACHE_HOME/pixart_rt/bundles/<model>-<res>-<backend>-<hash of all settings>

A folder per model and settings, so that none replaces another; where the weights of a model have
changed, its bundle is built again. The one file of inference that calls the exporter, when it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from pixart_rt.backends import BACKENDS, choose_backend
from pixart_rt.buckets import RESOLUTIONS
from pixart_rt.checkpoints.hub import locate
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.config import COMPONENTS, PUBLISHED, EngineConfig, Precision
from pixart_rt.errors import ConfigError

BOTH_SIZES = {"tiny": 1024, "xl-random": 1024}  # models of several resolutions, and the default
Progress = Callable[[str, int, int], None]


def find_or_build(
    model: str | Path,
    *,
    backend: str,
    res: int | None,
    precision: Precision | str | None,
    max_batch: int,
    device: str | torch.device | None,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> Path:
    """The folder of a whole bundle of these settings; see PixArtPipeline.from_pretrained."""
    from pixart_rt.export.build import build, default_precision  # onnx and compilers: seconds

    name = str(model)
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        backend, _ = choose_backend(())
    usual, usual_text = default_precision(backend)
    if device is not None and torch.device(device).type == "cpu":
        usual = usual_text = Precision.FP32
    config = EngineConfig(
        resolution=_resolution(name) if res is None else res,
        backend=backend,
        precision=_precision(precision) or usual,
        text_precision=_precision(precision) or usual_text,
        max_batch=max_batch,
        components=COMPONENTS if name != "xl-random" else ("transformer", "vae_decoder"),
    )
    folder = Path(cache_dir) if cache_dir is not None else bundle_cache()
    return build(name, folder / _label(name, config), config, progress=progress).path


def bundle_cache() -> Path:
    """Where bundles of this user live: $XDG_CACHE_HOME/pixart_rt/bundles."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pixart_rt" / "bundles"


def _resolution(model: str) -> int:
    """That of the model, where it has one."""
    published = {name: resolution for resolution, name in PUBLISHED.items()}
    known = BOTH_SIZES.get(model) or published.get(model)
    if known is not None:
        return known
    found = read_transformer(locate(model, ["transformer"])).config.resolution
    if found not in RESOLUTIONS:
        sizes = ", ".join(map(str, RESOLUTIONS))
        raise ConfigError(f"{model} is a {found} px model; bundles are made for {sizes}")
    return found


def _precision(asked: Precision | str | None) -> Precision | None:
    try:
        return None if asked is None else Precision(asked)
    except ValueError:
        known = ", ".join(Precision)
        raise ConfigError(f"precision {asked!r} is unknown; choose from {known}") from None


def _label(model: str, config: EngineConfig) -> str:
    """A folder's name; models of one name in two places have two."""
    path = Path(model)
    place = str(path.resolve()) if path.exists() else model
    settings = json.dumps([place, asdict(config)], sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    name = path.name.removesuffix(".pth") or "model"
    return f"{name}-{config.resolution}-{config.backend}-{digest}"
