"""Previews of an image in work: latents to a small picture, at a cost that a step does not feel.

    u = (latent pixel, 1)      rgb = (relu(u·H), u)·P

One colour for a latent pixel. H [C+1, K] are fixed random directions and P [K+C+1, 3] is fitted to
the bundle's VAE when it is built (export/preview_colors.py). Without H this would be the linear
projection that is used for Stable Diffusion; the colours of other latents, the tiny model's among
them, bend. diffusers' AutoencoderTiny, a decoder of a few layers, is the sharper choice.

B images, C latent channels, h×w latent pixels. Latents are as the sampler has them; those of a step
hold its noise, its estimate of the finished image does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.errors import BundleError, CheckpointError

PREVIEW = "preview.safetensors"  # in a bundle: {"features": H, "projection": P}, float32


class Previewer(Protocol):
    """latents [B, C, h, w] to pictures [B, 3, h', w'] in 0..1."""

    def __call__(self, latents: Tensor) -> Tensor: ...


class ColourPreview:
    """The bundle's own preview, at latent resolution: an eighth of the image's side."""

    def __init__(self, features: Tensor, projection: Tensor) -> None:
        """features [C+1, K] and projection [K+C+1, 3]."""
        self._features, self._projection = features, projection

    @classmethod
    def read(cls, bundle: Path) -> ColourPreview:
        """What lies in a bundle. Raises BundleError where there is none."""
        path = Path(bundle) / PREVIEW
        if not path.is_file():
            raise BundleError(
                f"previews were requested, but {bundle} has no {PREVIEW}; build it again with its "
                "VAE, or use pipe.load_preview_decoder with an AutoencoderTiny folder"
            )
        try:
            tensors = load_file(path)
            return cls(tensors["features"], tensors["projection"])
        except (SafetensorError, KeyError) as error:
            raise BundleError(f"{path} is damaged ({error}); build the bundle again") from error

    def __call__(self, latents: Tensor) -> Tensor:
        if self._features.device != latents.device:  # once
            self._features = self._features.to(latents.device)
            self._projection = self._projection.to(latents.device)
        pixels = expand(latents.float(), self._features) @ self._projection
        return pixels.movedim(-1, 1).clamp(0, 1)


def expand(latents: Tensor, features: Tensor) -> Tensor:
    """latents [B, C, h, w] to what the projection takes, [B, h, w, K+C+1]."""
    u = F.pad(latents.movedim(1, -1), (0, 1), value=1.0)
    return torch.cat([torch.relu(u @ features), u], -1)


class TinyPreview:
    """A diffusers AutoencoderTiny (TAESD), at full resolution."""

    def __init__(self, folder: Path, channels: int, device: torch.device) -> None:
        """channels: of the latents. Raises CheckpointError for a folder that does not fit."""
        from diffusers import AutoencoderTiny

        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; it is not an AutoencoderTiny")
        try:
            vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder} is no AutoencoderTiny: {reason}") from error
        if vae.config.latent_channels != channels:
            raise CheckpointError(
                f"the AutoencoderTiny in {folder} takes {vae.config.latent_channels} latent "
                f"channels, the bundle's latents have {channels}; it is of another model"
            )
        self._vae = vae.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        latents = latents.to(self._vae.device).float() / self._vae.config.scaling_factor
        image: Tensor = self._vae.decode(latents).sample
        return (image / 2 + 0.5).clamp(0, 1)


def to_pictures(pixels: Tensor, size: int | None = None) -> list[Image.Image]:
    """[B, 3, h, w] in 0..1 to PIL images; with `size`, scaled to that longest side in pixels.

    The one copy to the host waits for the device.
    """
    values = (pixels.movedim(1, -1) * 255).round().to(torch.uint8).cpu().numpy()
    pictures = [Image.fromarray(each) for each in values]
    if size is None:
        return pictures
    return [_scaled(picture, size) for picture in pictures]


def _scaled(picture: Image.Image, size: int) -> Image.Image:
    scale = size / max(picture.size)
    wanted = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize((wanted[0], wanted[1]), Image.Resampling.BICUBIC)
