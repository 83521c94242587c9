"""VAE decoding in overlapping tiles of latents, blended linearly: less memory, almost the image.

    image = sum_t weight_t · decode(latents of tile t)      sum_t weight_t = 1 at every pixel

A weight is the product of one ramp a side, from 0 at a tile's edge to 1 where the neighbour ends.
The result is not the untiled image: a VAE's GroupNorm takes its statistics, and its attention its
keys, from the tile alone. Where one tile covers the image, it is.

B images, C latent channels, h×w latent pixels. Any backend's decoder serves. All tiles of an image
have one size, so an engine runs one shape and torch.compile compiles once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.inference.tile_sizes import Profile, Tiling, starts, tile_size


class TiledDecoder:
    """A VAE decoder that calls another one for each tile of each image."""

    def __init__(
        self,
        decoder: Component,
        profiles: Sequence[Profile] = (),
        tiling: Tiling | None = None,
    ) -> None:
        """profiles: the shapes that `decoder` accepts, where it does not accept any."""
        self._decoder, self._profiles = decoder, profiles
        self._tiling = tiling or Tiling()

    def __call__(self, *, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] to images [B, 3, H, W] in float32.

        Raises ConfigError where no profile of the decoder holds a tile of these latents.
        """
        height, width = latents.shape[-2:]
        tile = tile_size(height, width, self._tiling, self._profiles)
        if tile == (height, width):  # one at a time all the same: a batch would take as much more
            return torch.cat([self._decoder(latents=image) for image in latents.split(1)])
        return torch.cat([self._decode(image, tile) for image in latents.split(1)])

    def _decode(self, latents: Tensor, tile: tuple[int, int]) -> Tensor:
        """One image [1, C, h, w]; no two decoded tiles exist at once."""
        (height, width), (th, tw) = latents.shape[-2:], tile
        rows = starts(height, th, self._tiling.overlap)
        columns = starts(width, tw, self._tiling.overlap)
        whole = None
        for i, top in enumerate(rows):
            for j, left in enumerate(columns):
                piece = latents[..., top : top + th, left : left + tw].contiguous()
                image = self._decoder(latents=piece).float()
                if whole is None:
                    scale = image.shape[-1] // tw
                    whole = image.new_zeros(*image.shape[:2], height * scale, width * scale)
                    down = weights(rows, th, scale).to(image.device)
                    across = weights(columns, tw, scale).to(image.device)
                y, x = top * scale, left * scale
                part = whole[..., y : y + th * scale, x : x + tw * scale]
                part += image * down[i, :, None] * across[j]
        assert whole is not None
        return whole


def weights(begins: list[int], tile: int, scale: int) -> Tensor:
    """[tiles, tile·scale] float32: a tile's share of its image pixels along one axis, each of
    `scale` to a latent pixel. Over all tiles they sum to 1 at every pixel.
    """
    length = tile * scale
    shares = torch.ones(len(begins), length, dtype=torch.float64)
    for index, (before, after) in enumerate(pairwise(begins)):
        common = length - (after - before) * scale
        ramp = (torch.arange(common, dtype=torch.float64) + 0.5) / common
        shares[index + 1, :common] *= ramp
        shares[index, length - common :] *= ramp.flip(0)
    total = torch.zeros((begins[-1] + tile) * scale, dtype=torch.float64)
    for begin, share in zip(begins, shares, strict=True):
        total[begin * scale : begin * scale + length] += share  # not 1 where three tiles meet
    places = torch.tensor(begins)[:, None] * scale + torch.arange(length)
    return (shares / total[places]).float()
