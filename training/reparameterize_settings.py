"""The settings of re-parameterisation: how a DiT becomes a text model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pixart_rt.config import CfgNull
from pixart_rt.errors import ConfigError

LAST_TIMESTEP = 999


class TBlock(StrEnum):
    """The start of the modulation shared by all blocks.

    Every choice gives the DiT's modulation at the chosen timestep. They differ at all others, where
    a block no longer follows a linear of its own (docs/training.md).
    """

    MEAN = "mean"
    """The mean of the DiT's adaLN linears, the nearest to all of them."""
    RANDOM = "random"
    """Normal with deviation 0.02, as the original code starts it."""
    BLOCK0 = "block0"
    """The first block's linear: time is embedded "only in the first block" (Section 2.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextStart:
    """What `reparameterize` is asked for; the defaults are the paper's."""

    t: float = 500  # the timestep at which the text model is the DiT
    t_block: TBlock = TBlock.MEAN
    sample_size: int | None = None  # latent pixels per side; None: the DiT's own
    interpolation_scale: float | None = None  # divides positions; None: sample_size over the DiT's
    caption_channels: int = 4096
    max_text_tokens: int = 120
    cfg_null: CfgNull = CfgNull.EMPTY_PROMPT
    seed: int = 0  # of the weights that the DiT has not

    def __post_init__(self) -> None:
        if not 0 <= self.t <= LAST_TIMESTEP:
            raise ConfigError(f"t must be a timestep between 0 and {LAST_TIMESTEP}, got {self.t}")
