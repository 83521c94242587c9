"""On a GPU: every backend builds, passes its gate and draws the image that the CPU draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.backends import get_backend
from pixart_rt.config import EngineConfig, Precision, text_lengths
from pixart_rt.errors import ConfigError
from pixart_rt.export.build import build, default_precision
from pixart_rt.export.numerics import verify_bundle

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
    bundle = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    pipe = PixArtPipeline.from_bundle(bundle, auto_capture=False)
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
    bundle = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    pipe = PixArtPipeline.from_bundle(bundle, auto_capture=False)
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "torch-compile", "aoti"])
def test_a_second_request_captures_itself_and_draws_the_same(
    pipeline_folder: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    """The oracle is the same bundle without graphs."""
    config = EngineConfig(resolution=256, backend=backend, precision=Precision.FP32)
    bundle = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    plain = PixArtPipeline.from_bundle(bundle, auto_capture=False)
    pipe = PixArtPipeline.from_bundle(bundle)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    prompts = ["a red circle", "a blue circle", "a red square", "a green square"]
    assert pipe.prompt_encoder is not None
    for seed, prompt in enumerate(prompts):
        actual = pipe(prompt, seed=seed, **arguments).images
        expected = plain(prompt, seed=seed, **arguments).images
        assert (actual - expected).norm() <= 1e-6 * expected.norm()
        for graphs in (pipe.denoiser.graphs, pipe.prompt_encoder.graphs):
            assert (graphs.captures, graphs.replays) == (min(seed, 1), seed)
    assert plain.denoiser.graphs.captures == 0
    assert pipe.denoiser.graphs.num_bytes > 0


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_and_the_request(
    pipeline_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the device inside the loop, which no capture allows."""
    config = EngineConfig(resolution=256, backend="torch", precision=Precision.FP32)
    bundle = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    pipe = PixArtPipeline.from_bundle(bundle)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(PROMPT, **arguments).images
    run, stream = pipe.denoiser._run, torch.cuda.current_stream()

    def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = run(*args, **kwargs)
        result.sum().item()
        return result

    monkeypatch.setattr(pipe.denoiser, "_run", waiting)
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        actual = pipe(PROMPT, **arguments).images
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert torch.cuda.current_stream() == stream
    assert len(pipe.denoiser.graphs) == 0
    monkeypatch.undo()
    for _ in range(2):  # another shape is captured as ever
        pipe(PROMPT, aspect_ratio="1:2", **arguments)
    assert pipe.denoiser.graphs.captures == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "backend", ["torch", "torch-compile", "aoti", "onnxruntime", "tensorrt-rtx"]
)
def test_a_pipeline_works_on_a_device_that_is_not_current(
    pipeline_folder: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    """Kernels, capture and replay follow the tensors; the oracle is the same on the current GPU."""
    if not get_backend(backend).available().ok:
        pytest.skip(f"{backend} does not run here")
    config = EngineConfig(resolution=256, backend=backend, precision=Precision.FP32)
    bundle = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    first = PixArtPipeline.from_bundle(bundle, "cuda:0")
    second = PixArtPipeline.from_bundle(bundle, "cuda:1")
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    with torch.cuda.device(0):
        for seed in range(3):  # runs, captures, replays
            expected = first(PROMPT, seed=seed, **arguments).images
            actual = second(PROMPT, seed=seed, **arguments).images
            assert actual.device == torch.device("cuda", 1)
            assert (actual.cpu() - expected.cpu()).norm() <= 1e-4 * expected.cpu().norm()
            assert torch.cuda.current_device() == 0
    replays = 2 if backend in ("torch", "torch-compile", "aoti") else 0
    assert first.denoiser.graphs.replays == second.denoiser.graphs.replays == replays
