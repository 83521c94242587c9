"""The colours of previews: least squares from latents to what the VAE's decoder makes of them.

    P = argmin |expand(latents)·P - rgb|² + RIDGE·|P|²      means over latent pixels

The images are made here, discs and boxes of strong colours before a gray, from a fixed seed. The
VAE encodes them and decodes what came out; rgb is the mean over the pixels of a latent pixel, of
the decoded image, for that is what a preview foretells. The error is on images that the fit has
not seen.

Tiny VAE, colours 0..1, scenes of its own kind: 0.064 to 0.070 with K = 64, 0.10 to 0.14 for the
linear projection, over seeds and sizes of the drawn images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.errors import NumericsError
from pixart_rt.inference.preview import PREVIEW, expand

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SEED = 20231
SIDE = 96  # pixels; 144 latent pixels an image
NUM_FITTED, NUM_UNSEEN = 16, 4
SHAPES = 3  # of an image
NUM_FEATURES = 64  # K
RIDGE = 1e-4  # a random VAE's latents may leave the fit undetermined


def write_preview(folder: Path, vae: AutoencoderKL) -> dict[str, float]:
    """Fit and write PREVIEW into a folder; {"preview_rms_error": ...}, colours being 0..1.

    Raises NumericsError for a VAE that gives NaN or Inf.
    """
    features, projection, error = fit_colours(vae)
    save_file({"features": features, "projection": projection}, folder / PREVIEW)
    return {"preview_rms_error": round(error, 4)}


def fit_colours(vae: AutoencoderKL) -> tuple[Tensor, Tensor, float]:
    """H [C+1, K], P [K+C+1, 3] and the root mean square error of colours on unseen images."""
    random = torch.Generator().manual_seed(SEED)
    latents, rgb = _samples(vae, random)
    features = torch.randn(latents.shape[1] + 1, NUM_FEATURES, generator=random)
    rows = expand(latents, features.double())
    seen, colours = rows[:NUM_FITTED].flatten(0, 2), rgb[:NUM_FITTED].flatten(0, 2)
    ridge = RIDGE * len(seen) * torch.eye(seen.shape[1], dtype=seen.dtype)
    projection = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ colours)
    guess = (rows[NUM_FITTED:] @ projection).clamp(0, 1)
    error = float((guess - rgb[NUM_FITTED:]).square().mean().sqrt())
    return features, projection.float().contiguous(), error


def _samples(vae: AutoencoderKL, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents [B, C, h, w] as the sampler has them and their colours [B, h, w, 3], float64."""
    images = draw_images(NUM_FITTED + NUM_UNSEEN, SIDE, random)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)
    with torch.no_grad():
        encoded = vae.encode((2 * images - 1).to(device)).latent_dist.mode()
        decoded = torch.cat([vae.decode(each).sample.cpu() for each in encoded.split(1)])
    latents = encoded.cpu().double() * vae.config.scaling_factor
    if not bool(latents.isfinite().all() and decoded.isfinite().all()):
        raise NumericsError("the VAE gave NaN or Inf for plain images; its weights are damaged")
    decoded = (decoded.double() / 2 + 0.5).clamp(0, 1)
    return latents, F.adaptive_avg_pool2d(decoded, latents.shape[-2:]).movedim(1, -1)


def draw_images(count: int, side: int, random: torch.Generator) -> Tensor:
    """[count, 3, side, side] in 0..1."""
    gray = torch.rand(count, 1, 1, 1, generator=random)
    images = (1.8 * (gray - 0.5) + 0.5).clamp(0, 1).repeat(1, 3, side, side)  # a fifth white
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for image in images:
        for index in range(SHAPES):
            y, x = (torch.rand(2, generator=random) * side).tolist()
            extent = float(torch.rand(1, generator=random) * 0.2 + 0.1) * side
            down, across = (rows - y).abs(), (columns - x).abs()
            inside = down.hypot(across) if index % 2 else torch.maximum(down, across)
            image[:, inside < extent] = _strong_colour(random)
    return images


def _strong_colour(random: torch.Generator) -> Tensor:
    """[3, 1]: any hue, nearly saturated, not dark."""
    hue, pale, bright = torch.rand(3, generator=random)
    ramps = (6 * (hue + torch.tensor([[0.0], [2 / 3], [1 / 3]])) % 6 - 3).abs() - 1
    return (1 - (1 - ramps.clamp(0, 1)) * (1 - 0.3 * pale)) * (1 - 0.4 * bright)
