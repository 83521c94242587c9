"""What a backend is: it says whether it works here, and loads a component as one callable.

Tensors of all components, whatever the precision inside, are float32 at the border (ids and masks
int64 and boolean), on the component's device:

    text_encoder   input_ids [B, T], attention_mask [B, T] int64         -> prompt_embeds [B, T, C]
    transformer    tokens [B, N, 16], pos_embed [1, N, D], modulation [B, 7, D],
                   prompt_embeds [B, T, C], prompt_mask [B, T] boolean   -> noise [B, N, p·p·out]
    vae_decoder    latents [B, 4, h, w] (as the sampler leaves them)     -> image [B, 3, 8h, 8w]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pixart_rt.bundle import Manifest

INPUTS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("input_ids", "attention_mask"),
    "transformer": ("tokens", "pos_embed", "modulation", "prompt_embeds", "prompt_mask"),
    "vae_decoder": ("latents",),
}
OUTPUTS = {"text_encoder": "prompt_embeds", "transformer": "noise", "vae_decoder": "image"}


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend runs here; if not, why, and what would make it."""

    ok: bool
    reason: str
    fix: str = ""


class Component(Protocol):
    """A text encoder, denoiser or decoder: keyword tensors in, one tensor out."""

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
