"""The shape of a ControlNet-Transformer: which blocks are copied, and what their copies see.

Two are published for PixArt; model/controlnet.py has their formulas.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError

CONTROLNET = "controlnet"  # in the config.json of a bundle's transformer, next to the model's
VAE_ENCODER = "vae_encoder"  # of a bundle with a ControlNet; no component: PyTorch always runs it


class ControlVariant(StrEnum):
    """How the copies are joined to the model."""

    PARALLEL = "parallel"
    """Each copy next to its block, with a zero linear before and after: the paper, A.9."""
    CHAINED = "chained"
    """Copies after each other, one zero linear before the first: the released PixArt-delta code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlNetConfig:
    """The default is the released checkpoints'. The paper's is PARALLEL with a copy of each block.

    The first `num_copies` blocks are copied. The last block of a chained one has none, because a
    copy's output goes into the block after its own.
    """

    variant: ControlVariant = ControlVariant.CHAINED
    num_copies: int = 13

    def __post_init__(self) -> None:
        if self.num_copies < 1:
            raise ConfigError(f"num_copies must be at least 1, got {self.num_copies}")

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError where the model has too few blocks."""
        most = model.num_layers - (self.variant is ControlVariant.CHAINED)
        if self.num_copies > most:
            raise ConfigError(
                f"a {self.variant} ControlNet with {self.num_copies} copies was requested for a "
                f"model of {model.num_layers} blocks, which has place for {most}; set num_copies"
            )

    def takes_control(self, index: int) -> bool:
        """Whether copy `index` has a zero linear before it, and so sees the control image."""
        return index == 0 or self.variant is ControlVariant.PARALLEL

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "variant": str(self.variant)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ControlNetConfig:
        """The settings in a config.json or manifest. Raises ConfigError for others."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown ControlNet settings {sorted(unknown)}")
        try:
            return cls(**{**values, "variant": ControlVariant(values["variant"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"ControlNet settings {values} are damaged ({error})") from error
