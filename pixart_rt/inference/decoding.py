"""Latents to images of the asked size, in the asked form.

B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import PixArtImageProcessor
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.errors import NumericsError
from pixart_rt.inference.denoiser import VAE_SCALE_FACTOR
from pixart_rt.inference.vae_tiling import Profile, TiledDecoder


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
    mode. Size and form are by diffusers' own code.
    """
    with torch.inference_mode(False), torch.no_grad():
        images = torch.cat(list(batches))
        require_finite(images, made_by)
        if output_type == "latent":
            return images
        processor = PixArtImageProcessor(vae_scale_factor=VAE_SCALE_FACTOR)
        if height is not None and width is not None and images.shape[-2:] != (height, width):
            images = processor.resize_and_crop_tensor(images, width, height)
        return processor.postprocess(images, output_type=output_type)
