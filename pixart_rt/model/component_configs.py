"""The configurations of text encoder and VAE, and the published ones. Without torch, so that
memory is planned without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json
from pixart_rt.typed import check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Config:
    """The part of a transformers T5 configuration that an encoder needs."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for sizes that no T5 has."""
        check_types(self)
        for name in self.__dataclass_fields__:
            value, most = getattr(self, name), 256 if name == "num_layers" else 2**24
            if not 0 < value <= most:
                raise ValueError(f"{name} is {value}")

    @classmethod
    def read(cls, folder: Path) -> T5Config:
        """From the config.json of a transformers T5EncoderModel folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no config.json; it is not a text encoder folder")
        try:
            values = read_json(path)
            found = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            config = cls(**found)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is no T5 configuration ({error})") from error
        if values.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
            raise CheckpointError(
                f"{path} is a T5 with {values['feed_forward_proj']} feed-forward; PixArt uses "
                "T5 v1.1 (gated-gelu)"
            )
        return config


T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24)

SD_VAE: dict[str, Any] = {  # the shape of sd-vae-ft-ema, for random weights
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
