"""Latents to images of the asked size, in the asked form.

B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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


def require_finite(image: Tensor, made_by: str) -> None:
    """Refuse NaN and infinity; the one place that waits for the device."""
    if not bool(image.isfinite().all()):
        raise NumericsError(
            f"an image came out with NaN or Inf ({made_by}); run `pixart-rt verify` on the bundle"
        )


def finish(
    image: Tensor, height: int | None, width: int | None, output_type: str, made_by: str
) -> Any:
    """One image [1, ...] checked, resized and cropped to the asked size, in the asked form.

    Tensors are ordinary ones, which autograd and edits in place accept, not those of inference
    mode. Raises NumericsError.
    """
    with torch.inference_mode(False), torch.no_grad():
        image = image.clone() if image.is_inference() else image
        require_finite(image, made_by)
        formed = in_form(image, height, width, output_type)
        return formed[0] if output_type == "pil" else formed


def together(images: Sequence[Any], output_type: str) -> Any:
    """Finished images of one size as a call returns them: a list, or one array or tensor."""
    if output_type == "pil":
        return list(images)
    if output_type == "np":
        return np.concatenate(images)
    with torch.inference_mode(False):
        return torch.cat(list(images))
