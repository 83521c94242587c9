"""A whole request of the tiny model, predicted and measured, as a user would run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig, Precision, TextPlace, Weights
from pixart_rt.errors import CapacityError
from pixart_rt.export.build import build
from pixart_rt.inference.prompts import NULL_PROMPT, load_null
from pixart_rt.inference.vae_tiling import TiledDecoder, Tiling
from pixart_rt.memory.fit import fit_bundle
from pixart_rt.memory.forecast import Forecast, Setting, forecast
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.memory.shapes import bundle_shape
from pixart_rt.memory.text_side import Words, absorbed_bytes
from pixart_rt.memory.tiers import RESERVE

STEPS = 3
LONG = "a small yellow circle above a large purple square on white " * 4
TOLERANCE = 0.10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    config = EngineConfig(resolution=256, backend="torch", max_batch=2)
    return build("tiny", out, config).path


def predicted(bundle: Path, batch: int, words: Words, tiling: Tiling | None = None) -> Forecast:
    """Of a pipeline's first request with other prompts, on the CPU in float32."""
    manifest = Manifest.read(bundle)
    setting = Setting(
        precision=Precision(manifest.engine_config["precision"]),
        text_precision=Precision(manifest.engine_config["text_precision"]),
        batch=batch,
        fused=False,
        conv_copies=0,  # the decoder runs channels-last
        cached_prompts=batch + (words.negative > 1),
        words=words,
        tiling=tiling,
    )
    return forecast(bundle_shape(bundle, manifest), 256, setting, STEPS)


WORDS = [  # prompts, the negative one
    (["a red circle"], ""),
    (["a red circle", "a blue square above a green star"], ""),
    (["a small yellow circle above a purple square " * 4], ""),  # keys and values: too long
    (["a red circle", LONG], "a blue square, a green star"),
    ([LONG], LONG[1:]),
]


@pytest.mark.parametrize(("prompts", "negative"), WORDS)
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_request_s_peak(
    bundle: Path, prompts: list[str], negative: str, output_type: str
) -> None:
    """Within 10 % even without the weights, which are predicted exactly. The decoder has the peak;
    for latents it is the transformer or the text side.
    """
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    assert pipe.prompt_encoder is not None
    tokens = pipe.prompt_encoder.tokenizer
    words = Words(*(int(tokens(each).attention_mask.sum(1).max())
                    for each in (prompts, [negative])))  # fmt: skip
    call: Callable[[], Any] = lambda: pipe(  # noqa: E731
        prompts, negative, num_inference_steps=STEPS, output_type=output_type
    )
    measured = peak_bytes(call)
    found = predicted(bundle, len(prompts), words)
    stages = found.stages if output_type == "pt" else {**found.stages, "decode": 0}
    assert max(stages.values()) - found.loaded == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize("prompts", [["a red circle"], ["a red circle", "a blue square"]])
def test_a_request_s_peak_in_tiles(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str], size: int
) -> None:
    """Of the 32x32 latents: one image and one tile at a time, beside all images."""
    tiling = Tiling(tile=size, overlap=size // 4)
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    monkeypatch.setattr(
        "pixart_rt.inference.decoding.TiledDecoder", partial(TiledDecoder, tiling=tiling)
    )
    measured, whole = (
        peak_bytes(
            lambda: pipe(prompts, num_inference_steps=STEPS, output_type="pt", vae_tiling=tiled)  # noqa: B023
        )
        for tiled in (True, False)
    )
    found = predicted(bundle, len(prompts), Words(9), tiling)
    assert found.peak - found.loaded == pytest.approx(measured, rel=TOLERANCE)
    assert measured < whole


def test_loading_takes_tiles_before_the_cpu_and_after_all_that_is_exact(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles small enough to matter at 256 px."""
    monkeypatch.setattr("pixart_rt.memory.fit.Tiling", partial(Tiling, tile=8, overlap=2))
    manifest = Manifest.read(bundle)
    limit, seen = 64 << 30, []
    with pytest.raises(CapacityError, match="the VAE in tiles and 1 at once"):
        while True:
            fit = fit_bundle(bundle, manifest, limit, on_gpu=False)
            seen.append((fit.max_batch, fit.text_place, fit.vae_tiling))
            limit = fit.forecast.peak + RESERVE - 1
    offload = TextPlace.OFFLOAD
    assert seen[:3] == [(2, "resident", False), (1, "resident", False), (1, offload, False)]
    assert (1, offload, True) in seen
    assert [tiled for *_, tiled in seen] == sorted(tiled for *_, tiled in seen)
    assert seen[-1] == (1, offload, True), "tiny's text encoder is too small to matter"
    asked = fit_bundle(bundle, manifest, 64 << 30, on_gpu=False, vae_tiling=True)
    assert (asked.max_batch, asked.vae_tiling) == (2, True)


def test_what_is_there_before_the_first_request(bundle: Path) -> None:
    """Weights of all parts, those of the text side among them, and the empty prompt."""
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    found = predicted(bundle, 1, Words(9))
    side = pipe.denoiser.texts.side
    assert found.parts["text_side"].weights == sum(each.nbytes for each in side.parameters())
    null = load_null(bundle / NULL_PROMPT, pipe.device)
    assert null is not None
    assert found.null_prompt == null.embeds.nbytes + null.mask.nbytes
    chain = pipe.transformer.component  # type: ignore[attr-defined]
    module = chain.parts[0]._function
    assert found.parts["transformer"].weights == sum(each.nbytes for each in module.parameters())


def test_a_second_request_takes_what_the_first_left(bundle: Path) -> None:
    """Nothing of a request outlives it but what the caches keep: then requests are equal, and the
    first took as much more.
    """
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    call = lambda: pipe("a red circle", num_inference_steps=1, output_type="pt")  # noqa: E731
    first, second, third = (peak_bytes(call) for _ in range(3))
    assert second == pytest.approx(third, rel=0.01)
    found = predicted(bundle, 1, Words(9))
    config = Manifest.read(bundle).config
    kept = found.caches + absorbed_bytes(config, Precision.FP32, 1, 16)
    assert first - second == pytest.approx(kept, rel=TOLERANCE)


def test_quantized_weights_pass_the_gate_and_draw(tmp_path: Path) -> None:
    config = EngineConfig(
        resolution=256,
        backend="torch",
        weights=Weights.INT8,
        text_weights=Weights.INT8,
        vae_tiling=True,
    )
    result = build("tiny", tmp_path / "int8", config)
    components = result.manifest.components
    assert components["transformer"].precision == "int8-weights"
    assert components["vae_decoder"].precision == "fp32"
    assert components["text_encoder"].parity["rms"] > 1e-3, "the quantized component was measured"
    assert PixArtPipeline.from_bundle(result.path, "cpu").vae_tiling, "as it was built"
    images = [
        PixArtPipeline.from_bundle(result.path, "cpu", text_place=place)(
            "a red circle", num_inference_steps=1, output_type="pt"
        ).images
        for place in (TextPlace.RESIDENT, TextPlace.OFFLOAD)
    ]
    assert bool(torch.isfinite(images[0]).all())
    assert all(torch.equal(image, images[0]) for image in images)
