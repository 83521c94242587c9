"""On a GPU: every backend builds, passes its gate and draws the image that the CPU draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pixart_rt import PixArtPipeline
from pixart_rt.backends import get_backend
from pixart_rt.config import EngineConfig, Precision, text_lengths
from pixart_rt.errors import ConfigError
from pixart_rt.export.build import build, default_precision
from pixart_rt.export.verify import verify_bundle

PROMPT = "a red circle above a blue square"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend",
    ["torch", "torch-compile", "aoti", "onnxruntime", "onnxruntime-tensorrt", "tensorrt",
     "tensorrt-rtx"],
)  # fmt: skip
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_a_bundle_draws_on_the_gpu_what_the_cpu_draws(
    pipeline_folder: Callable[..., Path], tmp_path: Path, backend: str, half: bool
) -> None:
    """The oracle is the eager float32 pipeline on the CPU, 20 steps."""
    state = get_backend(backend).available()
    if not state.ok:
        pytest.fail(f"{backend} does not run here: {state.reason}. {state.fix}")
    folder = str(pipeline_folder(32))
    reference = build(folder, tmp_path / "cpu", EngineConfig(resolution=256, backend="torch")).path
    expected = PixArtPipeline.from_bundle(reference, "cpu")(PROMPT, output_type="np").images
    precision, text = default_precision(backend) if half else (Precision.FP32, Precision.FP32)
    config = EngineConfig(
        resolution=256, backend=backend, precision=precision, text_precision=text, max_batch=2
    )
    try:
        bundle = build(folder, tmp_path / "gpu", config).path
    except ConfigError as error:  # TensorRT-RTX knows no such GPU: the message must say so
        assert backend == "tensorrt-rtx" and "not supported" in str(error)
        return
    assert all(check.ok for check in verify_bundle(bundle))
    pipe = PixArtPipeline.from_bundle(bundle)
    assert pipe.device.type == "cuda"
    actual = pipe([PROMPT, "a star"], seed=[0, 5], output_type="np").images[:1]
    assert np.abs(actual - expected).mean() <= (3 / 255 if half else 1 / 255)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "torch-compile", "aoti"])
def test_a_captured_loop_draws_what_the_loop_draws(
    pipeline_folder: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    config = EngineConfig(resolution=256, backend=backend, precision=Precision.FP32)
    pipe = PixArtPipeline.from_bundle(build(str(pipeline_folder(32)), tmp_path / "b", config).path)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    expected = [pipe(PROMPT, seed=seed, **arguments).images for seed in (1, 2)]
    assert pipe.prompt_encoder is not None
    lengths = text_lengths(pipe.config.max_text_tokens)
    captured = pipe.warmup(["1:1"], num_inference_steps=3, prompts=[PROMPT])
    assert captured == 1 + len(lengths), "the loop, and the text encoder at each length"
    for seed, latents in zip((1, 2), expected, strict=True):
        actual = pipe(PROMPT, seed=seed, **arguments).images
        assert (actual - latents).norm() < 1e-5 * latents.norm()
    assert pipe.denoiser.graphs.replays == 2
    pipe(PROMPT, aspect_ratio="1:2", **arguments)  # not captured: the loop runs
    assert pipe.denoiser.graphs.replays == 2
    if backend == "torch":
        weight = next(pipe.transformer.component._module.parameters())  # type: ignore[attr-defined]
        weight.mul_(1.5)
        changed = pipe(PROMPT, seed=1, **arguments).images
        assert pipe.denoiser.graphs.replays == 2, "a stale graph"
        assert (changed - expected[0]).norm() > 1e-3 * expected[0].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "torch-compile", "aoti"])
def test_a_captured_text_encoder_reads_what_it_reads(
    pipeline_folder: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    config = EngineConfig(resolution=256, backend=backend, precision=Precision.FP32)
    pipe = PixArtPipeline.from_bundle(build(str(pipeline_folder(32)), tmp_path / "b", config).path)
    text = pipe.prompt_encoder
    assert text is not None
    prompts = [" ".join(["harbour"] * count) for count in (1, 14, 30, 60, 119)]
    expected = [text([prompt]).embeds.clone() for prompt in prompts]
    text._cache.clear()
    text.warm(1)
    for prompt, embeds in zip(prompts, expected, strict=True):
        actual = text([prompt]).embeds
        assert (actual - embeds).norm() < 1e-5 * embeds.norm()
    assert text.graphs.replays == len(prompts)
    if backend == "torch":
        weight = next(text.text_encoder.component._module.parameters())  # type: ignore[attr-defined]
        weight.mul_(1.5)
        text(["a star"])
        assert text.graphs.replays == len(prompts), "a stale graph"
