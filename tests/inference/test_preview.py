"""Previews: the tiny model's colours, the pipeline's method, AutoencoderTiny, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import pixart_rt
from examples.tiny.scenes import BACKGROUNDS, PALETTE
from pixart_rt import PixArtPipeline, Request
from pixart_rt.bundle import Manifest
from pixart_rt.errors import BundleError, CheckpointError, NumericsError
from pixart_rt.export.preview_colors import fit_colours, write_preview
from pixart_rt.inference.preview import PREVIEW, ColourPreview, expand, to_pictures
from pixart_rt.inference.vae_tiling import TiledDecoder, Tiling
from pixart_rt.model.vae import read_vae

PROMPT = "a red circle above a blue square"
TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def tiny_preview(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ColourPreview]:
    folder = tmp_path_factory.mktemp("preview")
    found = write_preview(folder, read_vae(TINY / "vae"))
    assert 0 < found["preview_rms_error"] < 0.12
    return read_vae(TINY / "vae"), ColourPreview.read(folder)


def test_the_tiny_model_s_colours_are_told_apart(tiny_preview: tuple[Any, ColourPreview]) -> None:
    """A square of each colour of the palette, right in place; red, yellow and blue by name."""
    vae, preview = tiny_preview
    for background in ("white", "black"):
        for name, colour in PALETTE.items():
            image = torch.tensor(BACKGROUNDS[background]).view(3, 1, 1).expand(3, 128, 128) / 255
            image = image.clone()
            image[:, 40:88, 40:88] = torch.tensor(colour).view(3, 1, 1) / 255
            with torch.no_grad():
                latents = vae.encode(image[None] * 2 - 1).latent_dist.mode()
            picture = preview(latents)[0]
            assert picture.shape == (3, 16, 16)
            inside, outside = picture[:, 6:10, 6:10].mean((1, 2)), picture[:, 2, 2]
            assert (inside - outside).abs().max() > 0.15, f"{name} on {background} is seen"
            if name in ("red", "yellow", "blue"):
                nearest = min(PALETTE, key=lambda n: _distance(inside, PALETTE[n]))
                assert nearest in {"red": ("red",), "blue": ("blue",),
                                   "yellow": ("yellow", "orange")}[name]  # fmt: skip


def _distance(rgb: Tensor, colour: tuple[int, int, int]) -> float:
    return float((rgb - torch.tensor(colour) / 255).norm())


def test_two_builds_hold_the_same_colours() -> None:
    first, second = (fit_colours(read_vae(TINY / "vae")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert first[2] == second[2]


def test_a_vae_that_gives_nan_is_refused(tmp_path: Path) -> None:
    vae = read_vae(TINY / "vae")
    vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NumericsError, match="NaN or Inf for plain images"):
        write_preview(tmp_path, vae)
    assert not list(tmp_path.iterdir())


def test_expand_is_the_formula() -> None:
    latents, features = torch.randn(2, 4, 3, 5), torch.randn(5, 7)
    u = torch.cat([latents, torch.ones(2, 1, 3, 5)], 1).permute(0, 2, 3, 1)
    expected = torch.cat([(u @ features).clamp(min=0), u], -1)
    torch.testing.assert_close(expand(latents, features), expected)


def test_pictures_are_scaled_to_their_longest_side() -> None:
    pixels = torch.zeros(2, 3, 8, 16)
    pixels[0] = 1
    assert [p.size for p in to_pictures(pixels)] == [(16, 8)] * 2
    large = to_pictures(pixels, 64)
    assert [p.size for p in large] == [(64, 32)] * 2
    assert np.asarray(large[0]).min() == 255 and np.asarray(large[1]).max() == 0


def test_a_pipeline_previews_every_step(bundle_256: Path) -> None:
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")
    assert "preview_rms_error" in pipe.manifest.vae
    seen: list[tuple[int, int]] = []
    last: dict[str, Tensor] = {}

    def callback(pipe: PixArtPipeline, step: int, _t: Tensor, tensors: dict[str, Tensor]) -> None:
        pictures = pipe.preview(tensors["denoised"])
        seen.append((step, len(pictures)))
        assert pictures[0].size == (44, 22)
        last.update(tensors)

    pipe([PROMPT, "a star"], height=176, width=352, num_inference_steps=3, output_type="latent",
         callback_on_step_end=callback)  # fmt: skip
    assert seen == [(0, 2), (1, 2), (2, 2)]
    torch.testing.assert_close(last["denoised"], last["latents"])  # the last step removes all noise


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "sa-solver", "ddim", "iddpm", "lcm"])
def test_every_sampler_tells_its_estimate(bundle_256: Path, scheduler: str) -> None:
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")
    seen: list[dict[str, Tensor]] = []
    pipe(PROMPT, num_inference_steps=2, scheduler=scheduler, force_scheduler=True,
         output_type="latent",
         callback_on_step_end=lambda _p, _s, _t, tensors: seen.append(tensors))  # fmt: skip
    for tensors in seen:
        assert tensors["denoised"].shape == tensors["latents"].shape
        assert not torch.equal(seen[0]["denoised"], seen[0]["latents"])


def test_tiling_is_asked_for(bundle_256: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 256 px one tile covers the image; smaller ones give another, no less finite."""
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")

    def image(*, tiled: bool) -> Tensor:
        return pipe(PROMPT, num_inference_steps=1, output_type="pt", vae_tiling=tiled).images

    whole = image(tiled=False)
    assert torch.equal(image(tiled=True), whole)
    small = partial(TiledDecoder, tiling=Tiling(tile=16, overlap=4))
    monkeypatch.setattr("pixart_rt.inference.decoding.TiledDecoder", small)
    tiled = image(tiled=True)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    pipe.vae_tiling = True  # as of a bundle that was built so
    request = Request(prompt=PROMPT)
    assert torch.equal(
        pipe.generate_many([request], num_inference_steps=1, output_type="pt")[0], tiled
    )
    assert torch.equal(pipe(PROMPT, num_inference_steps=1, output_type="pt").images, tiled)
    assert torch.equal(image(tiled=False), whole)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    def make(channels: int) -> Path:
        folder = tmp_path_factory.mktemp("taesd")
        torch.manual_seed(0)
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=channels,
        ).save_pretrained(folder)  # fmt: skip
        return folder

    return make


def test_autoencoder_tiny_takes_over(bundle_256: Path, taesd: Callable[[int], Path]) -> None:
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")
    folder = taesd(4)
    pipe.load_preview_decoder(folder)
    latents = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        decoded = diffusers.AutoencoderTiny.from_pretrained(folder).decode(latents).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    actual = pipe.preview(latents)
    for picture, values in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(picture), values.numpy(), atol=1)


def test_a_preview_decoder_of_another_model_is_refused(
    bundle_256: Path, taesd: Callable[[int], Path], tmp_path: Path
) -> None:
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")
    with pytest.raises(CheckpointError, match="takes 16 latent channels"):
        pipe.load_preview_decoder(taesd(16))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        pipe.load_preview_decoder(tmp_path)


def test_a_bundle_without_previews_says_so(bundle_256: Path, tmp_path: Path) -> None:
    assert PREVIEW in Manifest.read(bundle_256).files
    old = tmp_path / "old"
    shutil.copytree(bundle_256, old)
    (old / PREVIEW).unlink()
    pipe = PixArtPipeline.from_bundle(old, "cpu", check=False)
    with pytest.raises(BundleError, match="build it again with its VAE, or use"):
        pipe.preview(torch.zeros(1, 4, 4, 4))
    (old / PREVIEW).write_bytes(b"junk")
    with pytest.raises(BundleError, match="is damaged"):
        pipe.preview(torch.zeros(1, 4, 4, 4))
