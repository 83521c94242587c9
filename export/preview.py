"""The projection of previews: least squares from a VAE's latents to the colours they stand for.

    P = argmin |latents·P[:C] + P[C] - rgb|²        over the latent pixels of drawn images

The images are made here (smooth colours, discs and boxes of one colour), from a fixed seed; rgb is
their mean over the pixels of a latent pixel. The error is that of images that the fit has not seen.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.errors import NumericsError
from pixart_rt.preview import PREVIEW

SEED = 20231
SIDE = 128  # pixels; 256 latent pixels an image, for 15 unknowns
NUM_FITTED, NUM_UNSEEN = 8, 4


def write_preview(folder: Path, vae: AutoencoderKL) -> dict[str, float]:
    """Fit and write PREVIEW into a folder; {"preview_rms_error": ...}, colours being 0..1.

    Raises NumericsError for an encoder that gives NaN or Inf.
    """
    projection, error = fit_projection(vae)
    save_file({"projection": projection}, folder / PREVIEW)
    return {"preview_rms_error": round(error, 4)}


def fit_projection(vae: AutoencoderKL) -> tuple[Tensor, float]:
    """P [C+1, 3] float32 and the root mean square error of colours in 0..1 on unseen images."""
    images = draw_images(NUM_FITTED + NUM_UNSEEN, SIDE, torch.Generator().manual_seed(SEED))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        encoded = vae.to(device).encode((2 * images - 1).to(device)).latent_dist.mode().cpu()
    latents = encoded.double() * vae.config.scaling_factor
    if not bool(latents.isfinite().all()):
        raise NumericsError(
            "the VAE's encoder gave NaN or Inf for plain images; its weights are damaged"
        )
    rgb = F.adaptive_avg_pool2d(images.double(), latents.shape[-2:])
    rows = F.pad(latents.movedim(1, -1), (0, 1), value=1.0)  # [..., C+1]: the constant last
    targets = rgb.movedim(1, -1)
    seen = rows[:NUM_FITTED].flatten(0, 2), targets[:NUM_FITTED].flatten(0, 2)
    projection = torch.linalg.lstsq(*seen, driver="gelsd").solution  # of any rank
    residual = rows[NUM_FITTED:] @ projection - targets[NUM_FITTED:]
    return projection.float().contiguous(), float(residual.square().mean().sqrt())


def draw_images(count: int, side: int, random: torch.Generator) -> Tensor:
    """[count, 3, side, side] in 0..1: a smooth field of colours with a disc and a box before it."""
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    images = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for image in images:
        for is_disc in (True, False):
            y, x = (torch.rand(2, generator=random) * side).tolist()
            extent = float(torch.rand(1, generator=random) * 0.2 + 0.1) * side
            down, across = (rows - y).abs(), (columns - x).abs()
            inside = down.hypot(across) if is_disc else torch.maximum(down, across)
            colour = torch.rand(3, 1, generator=random).round(decimals=1)
            image[:, inside < extent] = colour
    return images
