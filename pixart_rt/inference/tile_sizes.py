"""The sizes and places of a decoder's tiles (vae_tiling.py), without torch: forecasts need them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
                f"tiles of {self.tile} latent pixels that overlap by {self.overlap} were "
                "requested; an overlap is at most half a tile, and a tile at least 2"
            )


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
            f"tiles of {height}x{width} latents were requested, the VAE engine accepts {accepted}; "
            "ask for a size of its buckets, or build with another --backend"
        )
    return min(tiles, key=lambda tile: tile[0] * tile[1])


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: the fewest that overlap by at least `overlap`, evenly."""
    if tile >= size:
        return [0]
    steps = math.ceil((size - tile) / (tile - overlap))
    return [round(index * (size - tile) / steps) for index in range(steps + 1)]
