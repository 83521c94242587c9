"""What belongs to one call: its turn, cancel, callback, progress, seeds and tensors.

The transformer predicts no noise at once, so that calls are short; its prediction does not matter.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixart_rt import (
    BackendError,
    Cancelled,
    ConfigError,
    EngineConfig,
    NumericsError,
    PixArtPipeline,
    Request,
)
from pixart_rt.export.build import build

pytestmark = pytest.mark.usefixtures("no_kernels")
PROMPT = "a red circle above a blue square"
STEPS = 3


class Still:
    """A transformer that predicts no noise, and calls `at_step` at each of its steps."""

    capturable, cacheable = False, None

    def __init__(self, also_takes: frozenset[str]) -> None:
        self.also_takes = also_takes
        self.at_step: Any = lambda tokens: None

    def version(self) -> int:
        return 0

    def __call__(self, **inputs: Tensor) -> Tensor:
        self.at_step(inputs["tokens"])
        rows = len(inputs["null_rows"]) + len(inputs["text_rows"])
        return torch.zeros(rows, inputs["tokens"].shape[1], len(inputs["outputs"]))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PixArtPipeline:
    folder: Path = tmp_path_factory.mktemp("tiny") / "b"
    build("tiny", folder, EngineConfig(resolution=256, backend="torch", max_batch=2))
    return PixArtPipeline.from_bundle(folder, "cpu", check=False)


@pytest.fixture
def still(loaded: PixArtPipeline) -> Iterator[Still]:
    real = loaded.transformer
    loaded.transformer = stub = Still(real.also_takes)
    yield stub
    loaded.transformer = real


@pytest.fixture
def pipe(loaded: PixArtPipeline, still: Still) -> PixArtPipeline:
    return loaded


def latents(pipe: PixArtPipeline, **arguments: Any) -> Tensor:
    usual = {"num_inference_steps": STEPS, "output_type": "latent"}
    images: Tensor = pipe(**{"prompt": PROMPT, **usual, **arguments}).images
    return images


# Cancel.


def test_an_interrupt_before_a_call_is_not_for_it(pipe: PixArtPipeline) -> None:
    pipe.interrupt()
    assert latents(pipe).isfinite().all()


def test_a_cancel_before_a_call_is_heard(pipe: PixArtPipeline, still: Still) -> None:
    still.at_step = lambda _tokens: pytest.fail("no step may run")
    cancel = Event()
    cancel.set()
    with pytest.raises(Cancelled, match="before its turn"):
        latents(pipe, cancel=cancel)
    with pytest.raises(Cancelled, match="before its turn"):
        pipe.generate_many([Request(prompt=PROMPT)], num_inference_steps=1, cancel=cancel)


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "ddim"])
def test_an_interrupt_in_the_last_step_is_heard(
    pipe: PixArtPipeline, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "vae_decoder", lambda **_: pytest.fail("nothing may be decoded"))

    def stop(running: PixArtPipeline, step: int, *_: Any) -> None:
        if step == STEPS - 1:
            running.interrupt()

    for output_type in ("latent", "pt"):
        with pytest.raises(Cancelled, match="before the decoder"):
            latents(pipe, callback_on_step_end=stop, scheduler=scheduler, output_type=output_type)


def test_an_interrupt_while_it_decodes_is_heard(
    pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipe.vae_decoder

    def decode(**inputs: Tensor) -> Tensor:
        pipe.interrupt()
        return real(**inputs)

    monkeypatch.setattr(pipe, "vae_decoder", decode)
    with pytest.raises(Cancelled, match="before it returned"):
        latents(pipe, output_type="pt")


def test_of_two_calls_the_one_that_is_meant_stops(pipe: PixArtPipeline, still: Still) -> None:
    """The first runs when it is interrupted; the second waits for its turn, then finishes."""
    started, go_on = Event(), Event()
    results: dict[str, str] = {}

    def wait(_tokens: Tensor) -> None:
        if not started.is_set():
            started.set()
            assert go_on.wait(30)

    def call(name: str) -> None:
        try:
            latents(pipe)
            results[name] = "finished"
        except Cancelled as error:
            results[name] = str(error)

    still.at_step = wait
    first, second = (Thread(target=call, args=(name,)) for name in ("first", "second"))
    first.start()
    assert started.wait(30)
    second.start()
    pipe.interrupt()
    go_on.set()
    first.join(30)
    second.join(30)
    assert results == {"first": f"stopped before step 2 of {STEPS}", "second": "finished"}


def test_a_call_that_waits_is_stopped_by_its_own_cancel(pipe: PixArtPipeline, still: Still) -> None:
    started, go_on, cancel = Event(), Event(), Event()
    results: dict[str, str] = {}

    def wait(_tokens: Tensor) -> None:
        started.set()
        assert go_on.wait(30)

    def call(name: str, own: Event | None) -> None:
        try:
            latents(pipe, cancel=own)
            results[name] = "finished"
        except Cancelled as error:
            results[name] = str(error)

    still.at_step = wait
    first = Thread(target=call, args=("first", None))
    second = Thread(target=call, args=("second", cancel))
    first.start()
    assert started.wait(30)
    second.start()
    cancel.set()
    go_on.set()
    first.join(30)
    second.join(30)
    assert results == {"first": "finished", "second": "stopped before its turn"}


# Turns.


def test_threads_that_share_a_pipeline_get_their_own_images(pipe: PixArtPipeline) -> None:
    """Shapes, prompts, steps and seeds of each thread; noise decides the image."""
    shapes = ("1:1", "3:2", "2:3", "2:1")
    jobs = [
        {"prompt": f"prompt {thread} {turn}", "aspect_ratio": shapes[(thread + turn) % 4],
         "num_inference_steps": 1 + (thread + turn) % 3, "seed": 10 * thread + turn}
        for thread in range(4) for turn in range(8)
    ]  # fmt: skip
    expected = [latents(pipe, **job) for job in jobs]
    found: dict[int, Tensor] = {}
    errors: list[Exception] = []

    def work(thread: int) -> None:
        try:
            for index in range(8 * thread, 8 * thread + 8):
                found[index] = latents(pipe, **jobs[index])
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert all(torch.equal(found[index], image) for index, image in enumerate(expected))


def test_a_callback_may_call_the_pipeline(pipe: PixArtPipeline) -> None:
    inner: list[Tensor] = []

    def callback(running: PixArtPipeline, step: int, *_: Any) -> None:
        if step == 0:
            inner.append(latents(running, seed=9))

    outer = latents(pipe, callback_on_step_end=callback)
    assert torch.equal(inner[0], latents(pipe, seed=9)) and torch.equal(outer, latents(pipe))


# Streams, and images that fail.


def wanted() -> list[Request]:
    """Two shapes of one token count, one of another, and a setting of its own."""
    shapes = ("1:1", "3:2", "1:1", "1:1")
    steps = (2, 2, 1, 2)
    return [
        Request(prompt=f"{PROMPT} {index}", seed=index, aspect_ratio=shapes[index],
                num_inference_steps=steps[index])
        for index in range(4)
    ]  # fmt: skip


def test_a_stream_gives_each_image_as_its_batch_is_done(pipe: PixArtPipeline) -> None:
    """Groups in the order of their first images; another call, and another thread, in between."""
    requests = wanted()
    expected = pipe.generate_many(requests, output_type="latent")
    order = []
    for result in pipe.stream(requests, output_type="latent"):
        order.append(result.index)
        assert result.error is None and torch.equal(result.image, expected[result.index])
        assert result.request.seed == result.index
        assert result.sampling.num_inference_steps == requests[result.index].num_inference_steps
        latents(pipe, num_inference_steps=1)
        other = Thread(target=latents, args=(pipe,), kwargs={"num_inference_steps": 1})
        other.start()
        other.join(30)
        assert not other.is_alive(), "a stream holds the pipeline for a batch only"
    assert order == [0, 3, 1, 2]


def test_a_stream_is_checked_at_once_and_stopped_between_images(pipe: PixArtPipeline) -> None:
    with pytest.raises(ConfigError, match="guidance_scale"):
        pipe.stream([Request(prompt=PROMPT, guidance_scale=-1)])
    for wrong in (PROMPT, [PROMPT], 7):
        with pytest.raises(ConfigError, match="requests must be a list of Request, got"):
            pipe.generate_many(wrong)  # type: ignore[arg-type]
    cancel = Event()
    stream = pipe.stream(wanted(), output_type="latent", cancel=cancel)
    assert next(stream).index == 0 and next(stream).index == 3
    pipe.interrupt()  # of no batch
    assert next(stream).index == 1
    cancel.set()
    with pytest.raises(Cancelled):
        next(stream)
    assert list(pipe.stream([])) == [] == pipe.generate_many([])


@pytest.fixture
def spoils(pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which images the decoder spoils, counted from 0 in the order in which they are decoded."""
    bad: list[int] = []
    inner, counted = pipe.vae_decoder, [0]

    def decode(latents: Tensor) -> Tensor:
        images = inner(latents=latents).clone()
        for image in images:
            if counted[0] in bad:
                image[0, 0, 0] = torch.nan
            counted[0] += 1
        return images

    monkeypatch.setattr(pipe, "vae_decoder", decode)
    return bad


def test_an_image_that_is_not_finite_loses_no_other(
    pipe: PixArtPipeline, spoils: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    requests = wanted()
    spoils.append(1)  # of request 3, which shares the first batch
    images = pipe.generate_many(requests)
    assert [type(image).__name__ for image in images] == [
        "Image",
        "Image",
        "Image",
        "NumericsError",
    ]
    assert "NaN or Inf (tiny, dpm-solver++, seed 3)" in str(images[3])
    assert "1 of 4 images failed" in caplog.text
    spoils[:] = [5]
    results = {result.index: result for result in pipe.stream(requests)}
    assert results[3].image is None and isinstance(results[3].error, NumericsError)
    assert all(results[index].image.size for index in range(3))
    spoils[:] = range(8, 99)
    for call in (lambda: pipe.generate_many(requests), lambda: pipe(PROMPT, num_inference_steps=1)):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            call()


# Defaults of the bundle, and where it is.


def test_tiny_has_its_own_guidance(pipe: PixArtPipeline) -> None:
    assert pipe.manifest.sampling_defaults.guidance_scale == 3
    [result] = pipe.stream([Request(prompt=PROMPT)], output_type="latent")
    assert (result.sampling.guidance_scale, result.sampling.num_inference_steps) == (3, 20)
    with pytest.raises(ConfigError, match="scheduler lcm was requested of tiny, whose weights"):
        pipe(PROMPT, scheduler="lcm")
    latents(pipe, scheduler="lcm", force_scheduler=True, num_inference_steps=1)


def test_a_pipeline_is_only_where_it_was_loaded(pipe: PixArtPipeline) -> None:
    assert pipe.to("cpu") is pipe and pipe.to(torch.device("cpu")) is pipe
    with pytest.raises(ConfigError, match=r"to\('meta'\) .* load it there: .*device='meta'"):
        pipe.to("meta")
    with pytest.raises(ConfigError, match="takes a device"):
        pipe.to(torch.float16)  # type: ignore[arg-type]


def test_from_pretrained_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[str] = []

    def load() -> PixArtPipeline:
        return PixArtPipeline.from_pretrained(
            "tiny", "cpu", backend="torch", res=256, progress=lambda name, *_: built.append(name)
        )

    first = load()
    assert first.folder.parent == tmp_path / "pixart_rt" / "bundles"
    assert first.folder.name.startswith("tiny-256-torch-") and "writing the manifest" in built
    created = first.manifest.created
    built.clear()
    again = load()
    assert again.folder == first.folder and again.manifest.created == created
    assert built == ["reading tiny"]
    for wrong, says in (({"backend": "cuda"}, "backend 'cuda' is not one of auto"),
                        ({"precision": "int4"}, "precision 'int4' is unknown")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            PixArtPipeline.from_pretrained("tiny", **wrong)


# Callback and progress.


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "ddim"])
@pytest.mark.parametrize("returns", [True, False])
def test_latents_changed_in_place_are_taken(
    loaded: PixArtPipeline, scheduler: str, returns: bool
) -> None:
    """As in diffusers. The same as new latents, with the real transformer."""

    def in_place(_p: Any, _s: int, _t: Tensor, tensors: dict[str, Tensor]) -> Any:
        tensors["latents"].mul_(0.5)
        return tensors if returns else None

    def anew(_p: Any, _s: int, _t: Tensor, tensors: dict[str, Tensor]) -> Any:
        return {"latents": tensors["latents"] * 0.5}

    actual, expected = (
        latents(loaded, scheduler=scheduler, callback_on_step_end=callback)
        for callback in (in_place, anew)
    )
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, latents(loaded, scheduler=scheduler), atol=0.1)


def test_latents_of_another_shape_are_refused(pipe: PixArtPipeline) -> None:
    with pytest.raises(ConfigError, match=r"returned latents \[1, 4, 8, 8\] at step 0"):
        latents(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 8, 8)})


def test_progress_counts_the_steps_of_all_batches(pipe: PixArtPipeline) -> None:
    told: list[tuple[str, int, int]] = []
    pipe(PROMPT, num_images_per_prompt=pipe.max_batch + 1, num_inference_steps=2,
         output_type="latent", progress=lambda *step: told.append(step))  # fmt: skip
    assert told == [("denoising", 0, 4), ("denoising", 1, 4), ("decoding", 2, 4),
                    ("denoising", 2, 4), ("denoising", 3, 4), ("decoding", 4, 4)]  # fmt: skip


def test_progress_makes_no_latents_of_tokens(
    pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    from pixart_rt.inference import denoiser

    real = denoiser.depatchify
    monkeypatch.setattr(denoiser, "depatchify", lambda *given: made.append(0) or real(*given))
    latents(pipe, progress=lambda *_: None)
    assert len(made) == 1, "after the last step"
    latents(pipe, callback_on_step_end=lambda *_: None)
    assert len(made) == 1 + 2 * STEPS + 1, "latents and denoised of each step"


# Seeds and generators.


def test_a_seed_of_none_is_told(pipe: PixArtPipeline) -> None:
    output = pipe([PROMPT, "a star"], num_inference_steps=1, seed=None, output_type="latent")
    assert len(set(output.seeds)) == 2
    again = latents(pipe, num_inference_steps=1, prompt="a star", seed=output.seeds[1])
    torch.testing.assert_close(output.images[1:], again)
    request = Request(prompt=PROMPT, seed=None)
    [image] = pipe.generate_many([request], num_inference_steps=1, output_type="latent")
    torch.testing.assert_close(image, latents(pipe, num_inference_steps=1, seed=request.seed))


def noise(pipe: PixArtPipeline, still: Still, **arguments: Any) -> Tensor:
    """The tokens [images, N, C·p·p] that a call began with."""
    seen: list[Tensor] = []
    still.at_step = lambda tokens: seen.append(tokens.clone())
    latents(pipe, num_inference_steps=1, **arguments)
    return torch.cat(seen)


def test_one_generator_draws_for_all_images_as_in_diffusers(
    pipe: PixArtPipeline, still: Still
) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    from pixart_rt.model.embeddings import patchify

    count = pipe.max_batch + 1  # more than one batch
    generator = torch.Generator().manual_seed(7)
    actual = noise(pipe, still, num_images_per_prompt=count, generator=generator)
    theirs = randn_tensor((count, 4, 32, 32), generator=torch.Generator().manual_seed(7))
    assert torch.equal(actual, patchify(theirs, 2))
    again = noise(pipe, still, generator=generator)
    assert not torch.equal(again, actual[:1]), "it has gone on"


def test_a_generator_for_each_image_is_its_seed(pipe: PixArtPipeline, still: Still) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 2)]
    output = noise(pipe, still, prompt=[PROMPT, "a star"], generator=generators)
    assert torch.equal(output, noise(pipe, still, prompt=[PROMPT, "a star"], seed=[4, 2]))


# The tensors of the output, and types from elsewhere.


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_are_ordinary_ones(pipe: PixArtPipeline, output_type: str) -> None:
    images = pipe(PROMPT, num_inference_steps=1, output_type=output_type).images
    [alone] = pipe.generate_many(
        [Request(prompt=PROMPT)], num_inference_steps=1, output_type=output_type
    )
    for tensor in (images, alone):
        assert not tensor.is_inference()
        tensor.mul_(0.5)
        weight = torch.ones(1, requires_grad=True)
        (tensor * weight).sum().backward()
        torch.testing.assert_close(weight.grad, tensor.sum()[None], atol=1e-2, rtol=1e-4)


def test_types_of_other_libraries_are_taken_or_refused_in_words(pipe: PixArtPipeline) -> None:
    expected = latents(pipe, num_inference_steps=1, seed=3)
    actual = latents(pipe, negative_prompt=None, num_inference_steps=np.int64(1), seed=np.int64(3))
    assert torch.equal(actual, expected)
    for wrong in ({"prompt": 7}, {"prompt": [None]}, {"aspect_ratio": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be text"):
            latents(pipe, **wrong)


def test_a_prompt_of_a_batch_is_kept_by_itself(pipe: PixArtPipeline) -> None:
    encoder = pipe.prompt_encoder
    assert encoder is not None
    encoder.cache.clear()
    encoder([f"prompt {index} of a batch" for index in range(4)])
    kept = [encoder.cache.get(key) for key in encoder.cache]
    assert len(kept) == 4
    for row in kept:
        assert row is not None and len(row.embeds) == 1
        assert row.embeds.untyped_storage().nbytes() == row.embeds.nbytes
    assert encoder.cache.num_bytes == sum(row.num_bytes for row in kept if row is not None)


def test_mixed_batches_find_the_plans_of_their_images(loaded: PixArtPipeline) -> None:
    """Plans by the batch's tuple of shapes missed 51 times in 50 batches."""
    from pixart_rt.buckets import buckets
    from pixart_rt.config import Scheduler
    from pixart_rt.inference.request_plan import PlanKey

    planner = loaded.denoiser.planner
    first, second, *_ = [bucket for bucket in buckets(256) if bucket.num_tokens == 240]

    def plan(*shapes: Any) -> Any:
        return planner(PlanKey(Scheduler.DPM_SOLVER, 7, shapes))

    alone = [plan(first), plan(second)]
    misses = planner.misses
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        mixed = plan(*((first, second)[index] for index in order))
        assert planner.misses == misses
        for row, index in enumerate(order):
            assert torch.equal(mixed.modulation[:, row], alone[index].modulation[:, 0])
            assert torch.equal(mixed.pos_embed[row], alone[index].pos_embed[0])
        assert mixed.changes == tuple(
            max(pair) for pair in zip(alone[0].changes, alone[1].changes, strict=True)
        )


def test_a_call_in_a_fork_is_an_error_and_no_hang(pipe: PixArtPipeline) -> None:
    """Thread pools of PyTorch and ONNX Runtime do not survive a fork: the call would never end."""
    pipe("a red circle", num_inference_steps=1)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forks with threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            pipe("a red circle", num_inference_steps=1)
        except BackendError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(reading, 1000).decode()
    assert f"loaded in process {os.getpid()}" in said and "spawn" in said
    os.close(reading)
    os.close(writing)
