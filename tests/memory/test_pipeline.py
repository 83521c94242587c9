"""A whole request of the tiny model, predicted and measured, as a user would run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig, TextPlace, Weights
from pixart_rt.export.build import build
from pixart_rt.memory.forecast import Setting, forecast
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.memory.shapes import bundle_shape

STEPS = 3
TOLERANCE = 0.10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    config = EngineConfig(resolution=256, backend="torch", max_batch=2)
    return build("tiny", out, config).path


def predicted(bundle: Path, batch: int) -> tuple[int, int]:
    """The peak of a request, and the weights in it, on the CPU in float32."""
    manifest = Manifest.read(bundle)
    setting = Setting(
        precision=manifest_precision(manifest, "precision"),
        text_precision=manifest_precision(manifest, "text_precision"),
        batch=batch,
        fused=False,
        conv_copies=1,
        cached_prompts=batch + 1,  # and the empty one
    )
    found = forecast(bundle_shape(bundle, manifest), 256, setting, STEPS)
    return found.peak, sum(part.weights for part in found.parts.values())


def manifest_precision(manifest: Manifest, key: str) -> Any:
    from pixart_rt.config import Precision

    return Precision(manifest.engine_config[key])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_request_s_peak(bundle: Path, batch: int) -> None:
    """Within 10 % even without the weights, which are predicted exactly."""
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    prompts = ["a red circle", "a blue square above a green star"][:batch]
    call: Callable[[], Any] = lambda: pipe(  # noqa: E731
        prompts, num_inference_steps=STEPS, output_type="pt"
    )
    measured = peak_bytes(call)
    peak, weights = predicted(bundle, batch)
    assert peak - weights == pytest.approx(measured, rel=TOLERANCE)


def test_a_second_request_takes_what_the_first_took(bundle: Path) -> None:
    """Nothing of a request but its prompts' embeddings outlives it."""
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    call = lambda: pipe("a red circle", num_inference_steps=1, output_type="pt")  # noqa: E731
    call()
    first, second = peak_bytes(call), peak_bytes(call)
    assert first == pytest.approx(second, rel=0.01)


def test_quantized_weights_pass_the_gate_and_draw(tmp_path: Path) -> None:
    config = EngineConfig(
        resolution=256,
        backend="torch",
        weights=Weights.INT8,
        text_weights=Weights.INT8,
    )
    result = build("tiny", tmp_path / "int8", config)
    components = result.manifest.components
    assert components["transformer"].precision == "int8-weights"
    assert components["vae_decoder"].precision == "fp32"
    assert components["text_encoder"].parity["rms"] > 1e-3, "the quantized component was measured"
    images = [
        PixArtPipeline.from_bundle(result.path, "cpu", text_place=place)(
            "a red circle", num_inference_steps=1, output_type="pt"
        ).images
        for place in (TextPlace.RESIDENT, TextPlace.OFFLOAD)
    ]
    assert bool(torch.isfinite(images[0]).all())
    assert all(torch.equal(image, images[0]) for image in images)
