"""Tiled decoding: weights, cover of every bucket, engines' profiles, and the tiny VAE's images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pixart_rt
from examples.tiny.scenes import draw, place, random_scene
from pixart_rt.buckets import RESOLUTIONS, buckets
from pixart_rt.config import EngineConfig
from pixart_rt.errors import ConfigError
from pixart_rt.export.component_spec import vae_profiles
from pixart_rt.inference.vae_tiling import TiledDecoder, Tiling, starts, tile_size, weights
from pixart_rt.model.vae import VaeDecoder, read_vae

TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"
SIZES = sorted({b.height // 8 for r in RESOLUTIONS for b in buckets(r)})


def enlarge(latents: Tensor) -> Tensor:
    """A decoder without context: a pixel depends on its latent alone, so tiling must be exact."""
    return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize(
    "tiling", [Tiling(), Tiling(tile=24, overlap=12), Tiling(tile=7, overlap=0)]
)
def test_tiles_cover_every_axis_and_their_weights_sum_to_one(tiling: Tiling) -> None:
    for size in SIZES:
        tile = min(tiling.tile, size)
        begins = starts(size, tile, tiling.overlap)
        assert begins[0] == 0 and begins[-1] == size - tile
        for before, after in pairwise(begins):
            assert 0 < after - before <= tile - tiling.overlap
        share = weights(begins, tile, 8)
        total = torch.zeros(size * 8)
        for begin, each in zip(begins, share, strict=True):
            assert each.min() > 0
            total[begin * 8 : (begin + tile) * 8] += each
        torch.testing.assert_close(total, torch.ones(size * 8), atol=1e-6, rtol=0)


def test_a_weight_is_linear_across_an_overlap() -> None:
    share = weights([0, 4], 6, 1)
    torch.testing.assert_close(share[0], torch.tensor([1, 1, 1, 1, 0.75, 0.25]))
    torch.testing.assert_close(share[1], torch.tensor([0.25, 0.75, 1, 1, 1, 1]))


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_is_whole(resolution: int) -> None:
    """With and without an engine's profiles; a decoder without context gives every pixel back."""
    profiles = vae_profiles(EngineConfig(resolution=resolution))
    tiling = Tiling(tile=max(16, resolution // 32), overlap=6)
    for bucket in buckets(resolution):
        height, width = bucket.height // 8, bucket.width // 8
        latents = torch.randn(1, 4, height, width)
        for boxes in ([], profiles):
            seen = set()

            def decoder(latents: Tensor, seen: set[tuple[int, int]] = seen) -> Tensor:
                seen.add((latents.shape[2], latents.shape[3]))
                return enlarge(latents)

            image = TiledDecoder(decoder, boxes, tiling)(latents=latents)
            torch.testing.assert_close(image, enlarge(latents), atol=1e-5, rtol=1e-5)
            assert len(seen) == 1, "one shape an image"
            assert not boxes or any(_inside(seen.copy().pop(), box) for box in boxes)


def _inside(size: tuple[int, int], box: dict[str, list[int]]) -> bool:
    axes = zip(size, (box["latent_height"], box["latent_width"]), strict=True)
    return all(low <= side <= high for side, (low, _, high) in axes)


def test_the_smallest_tile_of_an_engine_is_chosen() -> None:
    profiles = vae_profiles(EngineConfig(resolution=1024))
    assert tile_size(128, 128, Tiling(), profiles) == (88, 88)
    assert tile_size(64, 256, Tiling(), profiles) == (64, 184)
    assert tile_size(128, 128, Tiling(tile=100, overlap=8), profiles) == (100, 100)
    with pytest.raises(
        ConfigError, match=r"32x32 latents were requested.*64x184 to 88x256 or 88x88"
    ):
        tile_size(32, 32, Tiling(), profiles)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 5), (8, -1), (1, 0)])
def test_impossible_tilings_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match="at most half a tile"):
        Tiling(tile=tile, overlap=overlap)


@pytest.fixture(scope="module")
def tiny() -> tuple[VaeDecoder, Tensor]:
    """The tiny VAE's decoder and the latents of two scenes of 320×384 pixels."""
    vae = read_vae(TINY / "vae")
    random = np.random.default_rng(1)
    images = []
    for _ in range(2):
        scene = random_scene(random)
        image = draw(scene, place(scene, 320, 384, random), 320, 384)
        images.append(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float())
    with torch.no_grad():
        latents = vae.encode(torch.stack(images) * 2 - 1).latent_dist.mode()
    return VaeDecoder(vae), latents * vae.config.scaling_factor


def test_one_tile_is_the_image(tiny: tuple[VaeDecoder, Tensor]) -> None:
    decoder, latents = tiny
    tiled = TiledDecoder(decoder)
    small = latents[:1, :, :20, :16]
    assert torch.equal(tiled(latents=small), decoder(latents=small))


def test_real_images_hardly_change(tiny: tuple[VaeDecoder, Tensor]) -> None:
    """Measured: rms 0.002 to 0.005 of a colour range of 1, the VAE's own error being 0.02."""
    decoder, latents = tiny
    whole = decoder(latents=latents)
    tiled = TiledDecoder(decoder, tiling=Tiling(tile=32, overlap=8))(latents=latents)
    assert tiled.shape == whole.shape and tiled.dtype == torch.float32
    difference = (tiled - whole) / 2
    assert 0 < difference.square().mean().sqrt() < 0.01
    assert difference.abs().max() < 0.15


def test_constant_latents_give_no_seams(tiny: tuple[VaeDecoder, Tensor]) -> None:
    decoder, latents = tiny
    flat = latents.mean((0, 2, 3))[None, :, None, None].expand(1, -1, 40, 40)
    image = TiledDecoder(decoder, tiling=Tiling(tile=24, overlap=8))(latents=flat)
    inner = image[..., 100:-100, 100:-100]  # away from the borders, which padding colours
    assert inner.std() < 0.02
