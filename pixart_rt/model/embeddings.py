"""What surrounds the token-space transformer: patches, positions, and sinusoids of scalars.

B images, C latent channels, h×w latent pixels, p patch side, N = (h/p)(w/p) tokens, D width.
"""

import math

import torch
from torch import Tensor

from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError

FREQUENCY_CHANNELS = 256  # of the sinusoid of a timestep, size or aspect ratio (DiT)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Latents [B, C, h, w] to patch tokens [B, N, C·p·p], row by row."""
    B, C, h, w = latents.shape
    p = patch_size
    if h % p or w % p:
        raise ConfigError(f"latents of {h}x{w} do not divide into {p}x{p} patches")
    patches = latents.reshape(B, C, h // p, p, w // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, (h // p) * (w // p), C * p * p)


def depatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """What `patchify` made, [B, N, C·p·p], back to latents [B, C, h, w]."""
    rows, columns = grid
    p = patch_size
    patches = tokens.reshape(len(tokens), rows, columns, tokens.shape[-1] // p**2, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * p, columns * p)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Output tokens [B, N, p·p·C] (channel last, as DiT projects) to [B, C, h, w]."""
    B, _, channels = tokens.shape
    rows, columns = grid
    p = patch_size
    patches = tokens.reshape(B, rows, columns, p, p, channels // p**2)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, columns * p)


def position_table(config: ModelConfig, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sine-cosine table [1, N, D], float32, of a grid of rows × columns of tokens.

    Both axes span [0, base_size / interpolation_scale) whatever the aspect ratio. The first half
    of the width encodes the column, the second the row; computed in float64 as diffusers does.
    """
    rows, columns = grid
    half = config.hidden_size // 2
    row = _axis_table(rows, half, config)[:, None].expand(rows, columns, half)
    column = _axis_table(columns, half, config)[None].expand(rows, columns, half)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, 2 * half).float()


def _axis_table(length: int, width: int, config: ModelConfig) -> Tensor:
    """Sines then cosines of the positions along one axis: [length, width], float64."""
    # diffusers divides float32 positions first; the same roundings give the same table.
    position = torch.arange(length, dtype=torch.float32) / (length / config.base_size)
    position = position / config.interpolation_scale
    frequency = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angle = position.double()[:, None] * (1.0 / 10000**frequency)[None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sinusoid(values: Tensor) -> Tensor:
    """Cosines then sines of scalars [B] at 128 frequencies: [B, 256], float32.

    The values stay float32 up to here: bfloat16 would round timestep 999 to 1000.
    """
    half = FREQUENCY_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angle = values.float()[:, None] * torch.exp(-math.log(10000) * steps / half)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
