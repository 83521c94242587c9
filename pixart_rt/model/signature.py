"""The inputs and the output of every component: names, dtypes and dimensions, in one table.

Exporter, backends, loader and numerics gate read it. A new input of the transformer is a row of
TRANSFORMER and an argument of its module (checkpoints/bundle_module.py).

Rows of the transformer are images with a text: with guidance an image has two. Row r < U is image
null_rows[r] with the prompt of one token whose vectors are constant[:, r]; the others are images
text_rows with the keys and values in text_kv. `outputs` are the wanted channels of a patch. With a
ControlNet, `control` are the control images' latents as tokens, and its copies count as blocks.

Tensors are float32 at the border, whatever the precision inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

CONTROLNET = "controlnet"  # inputs that only a bundle with a ControlNet takes
ABSORBED_FORM = "absorbed"  # inputs that may come instead of text_kv

# Dimensions that differ between calls of one engine, with the bounds of an exported graph. They are
# wider than any profile; diffusers' upsampling branches at 64 images.
MAX_BATCH = 63
BOUNDS: dict[str, tuple[int, int]] = {
    "batch": (1, MAX_BATCH),
    "num_tokens": (2, 1 << 16),
    "text_tokens": (2, 1 << 10),
    "num_null": (0, MAX_BATCH),
    "num_text": (1, 2 * MAX_BATCH),
    "num_outputs": (1, 1 << 10),
    "num_absorbed": (1, 1 << 10),  # heads times absorbed_length
    "absorbed_length": (1, 64),
    "latent_height": (2, 1 << 10),
    "latent_width": (2, 1 << 10),
}


class Values(StrEnum):
    """The values that an input may have, for random ones."""

    NORMAL = "normal"  # independent, of deviation `std`
    COUNT = "count"  # 0, 1, 2, ...
    PREFIX_MASK = "prefix-mask"  # nonzero for the first one to all places of the last dimension
    TOKEN_IDS = "token-ids"  # of a vocabulary, 0 where the prefix mask of the same shape is


@dataclass(frozen=True, slots=True)
class Input:
    """One input. A dimension is a number, a name of BOUNDS, or a name that a model gives a size."""

    name: str
    dims: tuple[str | int, ...]
    dtype: torch.dtype = torch.float32
    values: Values = Values.NORMAL
    std: float = 1.0
    only: str = ""  # CONTROLNET or ABSORBED_FORM; inputs without it are always there

    @property
    def dynamic(self) -> dict[int, str]:
        """The axes that differ between calls, with the names of their dimensions."""
        return {axis: dim for axis, dim in enumerate(self.dims) if dim in BOUNDS}


@dataclass(frozen=True, slots=True)
class Signature:
    """A component's inputs in order, and its one output."""

    inputs: tuple[Input, ...]
    output: str
    output_dims: tuple[str | int, ...]

    def of(self, *kinds: str) -> tuple[Input, ...]:
        """The inputs that are always there, and those of the given kinds."""
        return tuple(row for row in self.inputs if not row.only or row.only in kinds)

    def names(self, *kinds: str) -> tuple[str, ...]:
        """The names of `of(*kinds)`."""
        return tuple(row.name for row in self.of(*kinds))

    def dynamic(self, *kinds: str) -> dict[str, dict[int, str]]:
        """Input name to axis to dimension name, of what differs between calls."""
        return {row.name: row.dynamic for row in self.of(*kinds)}

    def random(
        self, sizes: Mapping[str, int], *kinds: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Random inputs on the CPU. `sizes` has every named dimension, and "vocabulary" for ids.

        The number of places that a prefix mask shows is drawn before all other values.
        """
        rows = self.of(*kinds)
        shapes = {row.name: tuple(_size(dim, sizes) for dim in row.dims) for row in rows}
        made: dict[str, Tensor] = {}
        for row in rows:
            if row.values is Values.PREFIX_MASK:
                *leading, length = shapes[row.name]
                shown = torch.randint(1, length + 1, (*leading, 1), generator=generator)
                made[row.name] = (torch.arange(length) < shown).to(row.dtype)
        for row in rows:
            shape = shapes[row.name]
            if row.values is Values.NORMAL:
                made[row.name] = row.std * torch.randn(shape, generator=generator)
            elif row.values is Values.COUNT:
                made[row.name] = torch.arange(shape[0], dtype=row.dtype)
            elif row.values is Values.TOKEN_IDS:
                ids = torch.randint(1, sizes["vocabulary"], shape, generator=generator)
                mask = next(mask for mask in made.values() if mask.shape == shape)
                made[row.name] = ids * mask
        return {row.name: made[row.name] for row in rows}


def _size(dim: str | int, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


TRANSFORMER = Signature(
    (
        Input("tokens", ("batch", "num_tokens", "token_channels")),
        Input("pos_embed", ("batch", "num_tokens", "width")),
        Input("modulation", ("batch", 7, "width"), std=0.5),
        Input("null_rows", ("num_null",), torch.int64, Values.COUNT),
        Input("text_rows", ("num_text",), torch.int64, Values.COUNT),
        Input("constant", ("blocks", "num_null", 1, "width")),
        Input("text_kv", ("blocks", "num_text", "max_text", 2, "heads", "head_dim")),
        Input("prompt_mask", ("num_text", "max_text"), torch.bool, Values.PREFIX_MASK),
        Input("outputs", ("num_outputs",), torch.int64, Values.COUNT),
        Input("control", ("batch", "num_tokens", "token_channels"), only=CONTROLNET),
        Input("absorbed_keys", ("blocks", "num_text", "num_absorbed", "width"), only=ABSORBED_FORM),
        Input(
            "absorbed_bias", ("blocks", "num_text", "heads", "absorbed_length"), only=ABSORBED_FORM
        ),
        Input(
            "absorbed_values", ("blocks", "num_text", "num_absorbed", "width"), only=ABSORBED_FORM
        ),
    ),
    "noise",
    ("num_null + num_text", "num_tokens", "num_outputs"),
)
SIGNATURES: dict[str, Signature] = {
    "text_encoder": Signature(
        (
            Input("input_ids", ("batch", "text_tokens"), torch.int64, Values.TOKEN_IDS),
            Input("attention_mask", ("batch", "text_tokens"), torch.int64, Values.PREFIX_MASK),
        ),
        "prompt_embeds",
        ("batch", "text_tokens", "caption_channels"),
    ),
    "transformer": TRANSFORMER,
    # Latents as the sampler leaves them; the image has eight pixels for each of theirs.
    "vae_decoder": Signature(
        (Input("latents", ("batch", "latent_channels", "latent_height", "latent_width")),),
        "image",
        ("batch", 3, "8 latent_height", "8 latent_width"),
    ),
}
ABSORBED: tuple[str, ...] = tuple(
    row.name for row in TRANSFORMER.inputs if row.only == ABSORBED_FORM
)
