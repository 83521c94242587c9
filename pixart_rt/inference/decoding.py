"""Latents to images of the asked size, in the asked form.

B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.errors import NumericsError
from pixart_rt.inference.images import in_form
from pixart_rt.inference.tile_sizes import Profile
from pixart_rt.inference.vae_tiling import TiledDecoder


def decode(
    latents: Tensor, decoder: Component, profiles: Sequence[Profile], *, tiled: bool
) -> Tensor:
    """Latents [B, C, h, w] to images [B, 3, H, W]. profiles: the shapes that a tile may have."""
    return (TiledDecoder(decoder, profiles) if tiled else decoder)(latents=latents)


def require_finite(images: Tensor, made_by: str) -> None:
    """Refuse NaN and infinity; the one place that waits for the device."""
    if not bool(images.isfinite().all()):
        raise NumericsError(
            f"an image came out with NaN or Inf ({made_by}); run `pixart-rt verify` on the bundle"
        )


def finish(
    batches: Sequence[Tensor], height: int | None, width: int | None, output_type: str, made_by: str
) -> Any:
    """All images, checked, resized and cropped to the asked size, then in the asked form.

    Tensors are ordinary ones, which autograd and edits in place accept, not those of inference
    mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        images = torch.cat(list(batches))
        require_finite(images, made_by)
        return in_form(images, height, width, output_type)
