"""TensorRT-RTX's runtime cache: kernels compiled on this machine, kept between processes.

The library itself checks that a cache is for this GPU, driver and version, and ignores any other.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pixart_rt.errors import ConfigError
from pixart_rt.files import replacing

logger = logging.getLogger(__name__)


class RuntimeCache:
    """The cache of one engine on one GPU. All execution contexts of the engine share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None

    @classmethod
    def of(cls, trt: ModuleType, engine_sha256: str, device: torch.device) -> RuntimeCache | None:
        """The cache of an engine, or None where the library has none (TensorRT)."""
        if not engine_sha256 or not hasattr(trt, "IRuntimeCache"):
            return None
        key = "|".join((engine_sha256, trt.__version__, torch.cuda.get_device_name(device)))
        return cls(cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache")

    def attach(self, config: Any) -> None:
        """Give an execution context's runtime configuration this cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self.path.is_file() and not self._cache.deserialize(self.path.read_bytes()):
                logger.info("runtime cache %s is for another GPU or driver; not used", self.path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache aside and rename it. A disk that refuses is a warning: no image depends
        on the cache, the next process only starts more slowly.
        """
        try:
            with replacing(self.path) as new:
                new.write_bytes(memoryview(self._cache.serialize()))
        except (OSError, ConfigError) as error:
            logger.warning("the TensorRT-RTX runtime cache was not kept: %s", error)


def cache_folder() -> Path:
    """Where caches of this user live: $XDG_CACHE_HOME/pixart_rt/tensorrt-rtx."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pixart_rt" / "tensorrt-rtx"
