"""pixart_rt: engines, images and training for PixArt-alpha. The public names are these."""

from typing import TYPE_CHECKING, Any

from pixart_rt.config import (
    CfgNull,
    EngineConfig,
    ModelConfig,
    Precision,
    SamplingConfig,
    Scheduler,
)
from pixart_rt.errors import (
    BackendError,
    BuildError,
    BundleError,
    Cancelled,
    CapacityError,
    CheckpointError,
    ConfigError,
    NumericsError,
    PixArtError,
    TrainingError,
)
from pixart_rt.version import __version__

if TYPE_CHECKING:
    from pixart_rt.export.build import build
    from pixart_rt.inference.pipeline import PixArtPipeline
    from pixart_rt.inference.request import Request
    from pixart_rt.training.run import train

_LAZY = {
    "PixArtPipeline": "pixart_rt.inference.pipeline",
    "Request": "pixart_rt.inference.request",
    "build": "pixart_rt.export.build",
    "train": "pixart_rt.training.run",
}

__all__ = [
    "BackendError",
    "BuildError",
    "BundleError",
    "Cancelled",
    "CapacityError",
    "CfgNull",
    "CheckpointError",
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "NumericsError",
    "PixArtError",
    "PixArtPipeline",
    "Precision",
    "Request",
    "SamplingConfig",
    "Scheduler",
    "TrainingError",
    "__version__",
    "build",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load the names that need torch when they are first used, not on import."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pixart_rt' has no attribute {name!r}")
    from importlib import import_module

    from pixart_rt.torchao_import import quiet_imports

    with quiet_imports():
        return getattr(import_module(_LAZY[name]), name)
