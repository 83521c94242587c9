"""VAE decoding in overlapping tiles of latents, blended linearly: less memory, almost the image.

    image = sum_t weight_t · decode(latents of tile t)      sum_t weight_t = 1 at every pixel

A weight is the product of one ramp a side, from 0 at a tile's edge to 1 where the neighbour ends.
The result is not the untiled image: a VAE's GroupNorm takes its statistics, and its attention its
keys, from the tile alone. Where one tile covers the image, it is.

B images, C latent channels, h×w latent pixels. Any backend's decoder serves. All tiles of an image
have one size, so an engine runs one shape and torch.compile compiles once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.errors import ConfigError

Profile = dict[str, list[int]]  # dimension name -> [min, opt, max], as in a bundle's manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Sizes in latent pixels, of 8 image pixels each."""

    tile: int = 64  # a side: 512 px, the smallest that the published VAEs were trained on
    overlap: int = 16  # of neighbours, at least

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= self.tile // 2 or self.tile < 2:
            raise ConfigError(
                f"tiles of {self.tile} latent pixels that overlap by {self.overlap} were asked; "
                "an overlap is at most half a tile, and a tile at least 2"
            )


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


def tile_size(
    height: int, width: int, tiling: Tiling, profiles: Sequence[Profile] = ()
) -> tuple[int, int]:
    """(height, width) of the tiles for latents of this size: the asked one, never more than the
    latents, where there are profiles the smallest that one of them holds.

    Raises ConfigError where none does.
    """
    if not profiles:
        return min(height, tiling.tile), min(width, tiling.tile)
    boxes = [(profile["latent_height"], profile["latent_width"]) for profile in profiles]
    tiles = [
        (min(max(tiling.tile, rows[0]), rows[2], height),
         min(max(tiling.tile, columns[0]), columns[2], width))
        for rows, columns in boxes
        if rows[0] <= height and columns[0] <= width
    ]  # fmt: skip
    if not tiles:
        accepted = " or ".join(f"{r[0]}x{c[0]} to {r[2]}x{c[2]}" for r, c in boxes)
        raise ConfigError(
            f"tiles of {height}x{width} latents were asked, the VAE engine accepts {accepted}; ask "
            "for a size of its buckets, or build with another --backend"
        )
    return min(tiles, key=lambda tile: tile[0] * tile[1])


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: the fewest that overlap by at least `overlap`, evenly."""
    if tile >= size:
        return [0]
    steps = math.ceil((size - tile) / (tile - overlap))
    return [round(index * (size - tile) / steps) for index in range(steps + 1)]


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
