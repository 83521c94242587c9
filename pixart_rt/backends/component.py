"""What a backend is: it says whether it works here, and loads a component as one callable.

Tensors of all components, whatever the precision inside, are float32 at the border (ids, rows and
masks int64 and boolean), on the component's device:

    text_encoder   input_ids [B, T], attention_mask [B, T] int64         -> prompt_embeds [B, T, C]
    transformer    tokens [B, N, 16], pos_embed [B, N, D], modulation [B, 7, D],
                   null_rows [U], text_rows [R-U], constant [L, U, 1, D],
                   text_kv [L, R-U, T, 2, H, K], prompt_mask [R-U, T] boolean,
                   outputs [P]                                           -> noise [R, N, P]
                   with a ControlNet also control [B, N, 16]
    vae_decoder    latents [B, 4, h, w] (as the sampler leaves them)     -> image [B, 3, 8h, 8w]

Rows of the transformer are images with a text: with guidance an image has two. Row r < U is image
null_rows[r] with the prompt of one token whose vectors are constant[:, r]; the others are images
text_rows with the keys and values in text_kv. `outputs` are the wanted channels of a patch. A
component may take other forms of the same input instead; it lists them in `also_takes`. `control`
are the control images' latents as tokens; L counts a ControlNet's copies after the blocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pixart_rt.bundle import Manifest

INPUTS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("input_ids", "attention_mask"),
    "transformer": (
        "tokens", "pos_embed", "modulation", "null_rows", "text_rows", "constant", "text_kv",
        "prompt_mask", "outputs",
    ),
    "vae_decoder": ("latents",),
}  # fmt: skip
ABSORBED = ("absorbed_keys", "absorbed_bias", "absorbed_values")  # instead of text_kv
CONTROL = "control"  # what the transformer of a bundle with a ControlNet takes besides
OUTPUTS = {"text_encoder": "prompt_embeds", "transformer": "noise", "vae_decoder": "image"}


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend runs here; if not, why, and what would make it."""

    ok: bool
    reason: str
    fix: str = ""


class Component(Protocol):
    """A text encoder, denoiser or decoder: keyword tensors in, one tensor out."""

    also_takes: frozenset[str]
    capturable: bool

    def version(self) -> Hashable:
        """Changes whenever a weight does."""
        ...

    def __call__(self, **inputs: Tensor) -> Tensor: ...


class Backend(Protocol):
    """One way to run components. Backends hold no state; components do."""

    name: str

    def available(self) -> Availability:
        """Whether engines of this backend can run on this machine."""
        ...

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        """The component `name` of a bundle, ready to be called on `device`.

        Raises BundleError for a missing or damaged engine, BackendError where it cannot run here.
        """
        ...
