"""The configuration of a checkpoint: from its config.json, from its tensors, and from flags.

A flag fills in what the checkpoint does not say; one that contradicts it is a ConfigError. Only the
interpolation scale and the unconditional convention may be changed by a flag: they are choices of
whoever samples, in the original code too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pixart_rt.config import CfgNull, ModelConfig
from pixart_rt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.29
DEFAULT_HEADS = 16
DEFAULT_TEXT_TOKENS = 120
PUBLISHED_HEAD_DIM = 72
SIGMA_TEXT_TOKENS = 300
_REQUIRED = {  # settings of diffusers' class that this transformer has no other form of
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What a user may say about a checkpoint; None where nothing was said."""

    heads: int | None = None
    sample_size: int | None = None
    interpolation_scale: float | None = None
    max_text_tokens: int | None = None
    cfg_null: CfgNull | None = None

    def settle(self, name: str, found: T | None, source: str) -> T | None:
        """The flag or what the checkpoint says; ConfigError if both speak and differ."""
        asked = getattr(self, name)
        if asked is not None and found is not None and asked != found:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {asked} was requested, but {source} says {found}; leave it out"
            )
        return found if asked is None else asked


def config_from_json(
    values: Mapping[str, Any], flags: Flags, text_tokens: int | None, source: str
) -> ModelConfig:
    """The configuration in a diffusers config.json.

    `text_tokens` is what the rows of a y_embedding or the pipeline's family say, if anything.
    """
    _check_json(values, source)
    try:
        heads, head_dim = values["num_attention_heads"], values["attention_head_dim"]
        sample_size = values["sample_size"]
        scale = values.get("interpolation_scale")
        micro = values.get("use_additional_conditions")
        stored_null = CfgNull(values.get("_pixart_rt_cfg_null", CfgNull.EMPTY_PROMPT))
        flags.settle("heads", heads, source)
        flags.settle("sample_size", sample_size, source)
        tokens = values.get("_pixart_rt_max_text_tokens", text_tokens)
        tokens = flags.settle("max_text_tokens", tokens, source)
        plain = not (sample_size == 128 if micro is None else micro)
        if tokens is None and sample_size == 128 and plain:
            raise ConfigError(
                f"{source} does not say how long its prompts are, and without micro-conditioning "
                "at 1024 px it may be PixArt-Sigma; give --max-text-tokens (120, or 300 for Sigma) "
                "or the whole pipeline folder"
            )
        return ModelConfig(
            num_layers=values["num_layers"],
            num_heads=heads,
            head_dim=head_dim,
            in_channels=values["in_channels"],
            out_channels=values.get("out_channels") or values["in_channels"],
            patch_size=values["patch_size"],
            caption_channels=values["caption_channels"],
            max_text_tokens=tokens or DEFAULT_TEXT_TOKENS,
            sample_size=sample_size,
            interpolation_scale=flags.interpolation_scale or scale or max(sample_size // 64, 1),
            micro_conditioning=sample_size == 128 if micro is None else micro,
            cfg_null=flags.cfg_null or stored_null,
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; is it a PixArt transformer's?") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{source} has a setting of a wrong kind ({error})") from error


def _check_json(values: Mapping[str, Any], source: str) -> None:
    if values.get("_class_name") not in CLASSES:
        raise CheckpointError(
            f"{source} is of class {values.get('_class_name')}, not {' or '.join(CLASSES)}"
        )
    for name, required in _REQUIRED.items():
        # Absent means the class's default, and only norm_type's was ever another.
        if values.get(name, required) != required:
            raise CheckpointError(
                f"{source} has {name} {values[name]!r}; a PixArt transformer has {required!r}"
            )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json that diffusers' PixArtTransformer2DModel loads.

    diffusers ignores keys with a leading underscore; our own two settings live there.
    """
    scale = config.interpolation_scale
    return {
        "_class_name": CLASSES[0],
        "_pixart_rt_cfg_null": str(config.cfg_null),
        "_pixart_rt_max_text_tokens": config.max_text_tokens,
        **_REQUIRED,
        "attention_head_dim": config.head_dim,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "in_channels": config.in_channels,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "use_additional_conditions": config.micro_conditioning,
    }


def config_from_tensors(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Any], flags: Flags, source: str
) -> ModelConfig:
    """The configuration of an original state dict, from the shapes of its tensors.

    `stored` is what `write_pth` kept next to the weights; empty for a file of the original code.
    """
    try:
        width, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        caption_channels = tensors["y_embedder.y_proj.fc1.weight"].shape[1]
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source} is not a PixArt transformer: {error} is missing or of another rank"
        ) from error
    heads = _heads(width, flags.settle("heads", stored.get("num_heads"), source), source)
    layers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    null = tensors.get("y_embedder.y_embedding")
    tokens = stored.get("max_text_tokens") if null is None else null.shape[0]
    sample_size = flags.settle("sample_size", _sample_size(tensors, stored, patch_size), source)
    if sample_size is None:
        raise ConfigError(
            f"{source} has no pos_embed to tell its resolution; give --sample-size in latent "
            "pixels: 128 for 1024 px, 64 for 512, 32 for 256"
        )
    shape: dict[str, Any] = {
        "num_layers": 1 + max(layers, default=-1),
        "num_heads": heads,
        "head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch_size,
        "caption_channels": caption_channels,
        "max_text_tokens": flags.settle("max_text_tokens", tokens, source) or DEFAULT_TEXT_TOKENS,
        "sample_size": sample_size,
        "micro_conditioning": "csize_embedder.mlp.0.weight" in tensors,
        "cfg_null": flags.cfg_null or CfgNull(stored.get("cfg_null", CfgNull.EMPTY_PROMPT)),
    }
    scale = flags.interpolation_scale or stored.get("interpolation_scale")
    table = tensors.get("pos_embed")
    return ModelConfig(
        **shape, interpolation_scale=scale or _interpolation_scale(shape, table, source)
    )


def _heads(width: int, asked: int | None, source: str) -> int:
    heads = DEFAULT_HEADS if asked is None else asked
    if heads < 1 or width % heads:
        raise ConfigError(f"{heads} heads do not divide the width {width} of {source}; set --heads")
    if asked is None and width // heads != PUBLISHED_HEAD_DIM:
        logger.warning(
            "%s: %d heads were assumed, %d channels each, where published models have %d; "
            "if that is not so, set --heads",
            source, heads, width // heads, PUBLISHED_HEAD_DIM,
        )  # fmt: skip
    return heads


def _sample_size(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Any], patch_size: int
) -> int | None:
    """Latent pixels per side: the position table has a row for each patch of a square."""
    table = tensors.get("pos_embed")
    if table is None:
        return stored.get("sample_size")
    side = math.isqrt(table.shape[-2]) if table.dim() == 3 else 0
    width = tensors["x_embedder.proj.weight"].shape[0]
    if side < 1 or tuple(table.shape) != (1, side * side, width):
        raise CheckpointError(
            f"pos_embed is {list(table.shape)}; it should be [1, rows x rows, {width}]"
        )
    return side * patch_size


def _interpolation_scale(shape: dict[str, Any], table: Tensor | None, source: str) -> float:
    """The scale that the position table was made with; without a table, the published one.

    That is 1, 1, 2 for 256, 512, 1024 px in PixArt-alpha, and 0.5, 1, 2, 4 up to 2048 px in Sigma,
    which is told by its 300 text tokens.
    """
    size = shape["sample_size"]
    if table is None or table.shape[1] < 4:
        sigma = shape["max_text_tokens"] == SIGMA_TEXT_TOKENS
        return float(size / 64 if sigma else max(size // 64, 1))
    import torch  # not at the top: `pixart-rt plan` reads a config.json without it

    from pixart_rt.model.embeddings import position_table

    # The second row is column 1: its first sine and cosine are those of 1 / scale.
    row = table[0, 1].double()
    angle = math.atan2(float(row[0]), float(row[row.numel() // 4]))
    if angle > 0:
        scale = float(f"{1 / angle:.2g}")
        side = math.isqrt(table.shape[1])
        made = position_table(ModelConfig(**shape, interpolation_scale=scale), (side, side))
        if torch.allclose(made, table.float(), atol=2e-2, rtol=0):  # tables may be in bfloat16
            return scale
    raise CheckpointError(
        f"the pos_embed of {source} is not a sine-cosine table of one scale; "
        "set --interpolation-scale (PixArt-alpha: 1, and 2 at 1024 px)"
    )
