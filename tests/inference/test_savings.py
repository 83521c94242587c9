"""Work that is left out changes nothing: each saving on and off gives the same latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.approximations import FirstBlockCache, StepCache
from pixart_rt.buckets import buckets
from pixart_rt.config import EngineConfig, Precision, Saving
from pixart_rt.export.build import build
from pixart_rt.inference.request import Request

SHORT = "a red circle above a blue square"
LONG = "a large yellow star to the left of a small purple circle, " * 9  # the standard form
NEGATIVE = "two green triangles on a white background"
# Of the latents' norm in float32. Only sums in another order differ: tests/model/test_text_kv.py
# has the same in float64. Steps, because the first alone divides by 1/150 of its input: the
# rounding of a one-step image is 100 times that of its noise.
FLOAT32, STEPS = 1e-5, 6
SHAPES = buckets(256)[::5]  # eight of the forty


pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> PixArtPipeline:
    """Tiny in PyTorch, whose denoiser takes every form."""
    folder = tmp_path_factory.mktemp("tiny") / "b"
    build("tiny", folder, EngineConfig(resolution=256, backend="torch"))
    return PixArtPipeline.from_bundle(folder, "cpu")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> PixArtPipeline:
    """The same in bfloat16."""
    config = EngineConfig(resolution=256, backend="torch", precision=Precision.BF16)
    bundle = build("tiny", tmp_path_factory.mktemp("half") / "b", config).path
    return PixArtPipeline.from_bundle(bundle, "cpu")


@pytest.fixture(scope="module")
def without() -> dict[str, torch.Tensor]:
    """Latents without any saving, by negative prompt; made once."""
    return {}


def latents(pipe: PixArtPipeline, savings: frozenset[Saving], **arguments: Any) -> torch.Tensor:
    pipe.denoiser.savings = savings
    values = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    try:
        return pipe(**{**values, **arguments}).images
    finally:
        pipe.denoiser.savings = frozenset(Saving)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class Unshared:
    """The transformer called with every image twice, so that its halves share nothing."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.also_takes, self.capturable = inner, inner.also_takes, False
        self.calls = 0

    def version(self) -> int:
        return 0

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for name in ("tokens", "pos_embed", "modulation"):
            inputs[name] = torch.cat([inputs[name], inputs[name]])
        inputs["text_rows"] = inputs["text_rows"] + len(inputs["tokens"]) // 2
        return self.inner(**inputs)


@pytest.mark.parametrize("bucket", SHAPES, ids=lambda bucket: f"{bucket.height}x{bucket.width}")
def test_all_savings_together_at_eight_shapes(pipe: PixArtPipeline, bucket: Any) -> None:
    size = {"height": bucket.height, "width": bucket.width}
    for prompt, negative in ((SHORT, ""), (LONG, NEGATIVE)):
        arguments = {"prompt": prompt, "negative_prompt": negative, **size, "seed": 4}
        fast = latents(pipe, frozenset(Saving), **arguments)
        slow = latents(pipe, frozenset(), **arguments)
        assert distance(fast, slow) < FLOAT32
        assert slow.std() > 0.1, "flat latents would prove nothing"


@pytest.mark.parametrize("saving", Saving)
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_each_saving_alone(
    pipe: PixArtPipeline, without: dict[str, torch.Tensor], saving: Saving, negative: str
) -> None:
    arguments = {"prompt": [SHORT, "a star"], "negative_prompt": negative, "seed": 9}
    if negative not in without:
        without[negative] = latents(pipe, frozenset(), **arguments)
    alone = latents(pipe, frozenset({saving}), **arguments)
    assert distance(alone, without[negative]) < FLOAT32


def test_the_first_block_is_shared(pipe: PixArtPipeline) -> None:
    transformer = pipe.transformer
    expected = latents(pipe, frozenset(Saving), prompt=SHORT)
    pipe.transformer = unshared = Unshared(transformer)
    try:
        actual = latents(pipe, frozenset(Saving), prompt=SHORT)
    finally:
        pipe.transformer = transformer
    assert unshared.calls == STEPS
    assert distance(actual, expected) < FLOAT32


@pytest.mark.parametrize(("prompt", "negative", "form"), [
    (SHORT, "", {"absorbed_keys": 16, "rows": (1, 1)}),
    (LONG, "", {"rows": (1, 1)}),
    (SHORT, NEGATIVE, {"absorbed_keys": 16, "rows": (0, 2)}),
    (LONG, NEGATIVE, {"rows": (0, 2)}),
])  # fmt: skip
def test_the_form_follows_from_the_prompts(
    pipe: PixArtPipeline, prompt: str, negative: str, form: dict[str, Any]
) -> None:
    """What reaches the transformer: constant rows, absorbed keys of length L, channels."""
    seen: dict[str, torch.Tensor] = {}
    transformer = pipe.transformer

    class Recorder(Unshared):
        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            seen.update(inputs)
            return self.inner(**inputs)

    pipe.transformer = Recorder(transformer)
    try:
        latents(pipe, frozenset(Saving), prompt=prompt, negative_prompt=negative)
    finally:
        pipe.transformer = transformer
    assert (len(seen["null_rows"]), len(seen["text_rows"])) == form["rows"]
    assert ("absorbed_keys" in seen) is ("absorbed_keys" in form)
    assert ("text_kv" in seen) is ("absorbed_keys" not in form)
    if "absorbed_keys" in form:
        assert seen["absorbed_keys"].shape[2] == 2 * form["absorbed_keys"]  # two heads
    assert len(seen["tokens"]) == 1, "one image, whatever its rows"
    assert len(seen["outputs"]) == 16, "no variance for DPM-Solver++"


def test_without_guidance_there_is_one_row(pipe: PixArtPipeline) -> None:
    rows = []
    transformer = pipe.transformer

    class Recorder(Unshared):
        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            rows.append(len(inputs["null_rows"]) + len(inputs["text_rows"]))
            return self.inner(**inputs)

    pipe.transformer = Recorder(transformer)
    try:
        latents(pipe, frozenset(Saving), prompt=SHORT, guidance_scale=1.0, num_inference_steps=3)
        latents(pipe, frozenset(Saving), prompt=SHORT, num_inference_steps=4,
                guidance_interval=(0.25, 0.75))  # fmt: skip
    finally:
        pipe.transformer = transformer
    assert rows == [1, 1, 1, 1, 2, 2, 1]


def test_the_empty_interval_is_no_guidance(pipe: PixArtPipeline) -> None:
    arguments = {"prompt": SHORT, "guidance_scale": 6.0}
    none = latents(pipe, frozenset(Saving), **arguments, guidance_interval=(0.5, 0.5))
    plain = latents(pipe, frozenset(Saving), **{**arguments, "guidance_scale": 1.0})
    assert torch.equal(none, plain)
    whole = latents(pipe, frozenset(Saving), **arguments, guidance_interval=(0.0, 1.0))
    assert torch.equal(whole, latents(pipe, frozenset(Saving), **arguments))
    assert distance(none, whole) > 0.01


def test_plans_and_texts_are_made_once(pipe: PixArtPipeline) -> None:
    planner, texts = pipe.denoiser.planner, pipe.denoiser.texts
    latents(pipe, frozenset(Saving), prompt="a plan", num_inference_steps=2, aspect_ratio="3:2")
    plans, kept = planner.misses, texts.misses
    latents(pipe, frozenset(Saving), prompt="a plan", num_inference_steps=2, aspect_ratio="3:2")
    assert (planner.misses, texts.misses) == (plans, kept)
    latents(pipe, frozenset(Saving), prompt="a plan", num_inference_steps=3, aspect_ratio="3:2")
    latents(pipe, frozenset(Saving), prompt="another", num_inference_steps=3, aspect_ratio="2:3")
    assert (planner.misses, texts.misses) == (plans + 2, kept + 1)


def test_many_requests_share_batches_and_stay_the_same(
    pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes of equal token counts in one batch; the images are those made one by one."""
    monkeypatch.setattr(pipe, "max_batch", 3)
    by_count: dict[int, list[Any]] = {}
    for bucket in buckets(256):
        by_count.setdefault(bucket.num_tokens, []).append(bucket)
    group = max(by_count.values(), key=len)[:4]
    requests = [
        Request(prompt=f"{SHORT} {i}", seed=i, height=bucket.height, width=bucket.width,
                negative_prompt=NEGATIVE if i == 2 else "", guidance_scale=[3.0, 5.5, 2.0, 1.0][i])
        for i, bucket in enumerate(group)
    ]  # fmt: skip
    requests += [Request(prompt="a star", seed=8), Request(prompt="a star", seed=8)]
    sizes = []
    transformer = pipe.transformer

    class Recorder(Unshared):
        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            sizes.append(len(inputs["tokens"]))
            return self.inner(**inputs)

    pipe.transformer = Recorder(transformer)
    try:
        together = pipe.generate_many(requests, num_inference_steps=2, output_type="latent")
    finally:
        pipe.transformer = transformer
    assert len({(bucket.height, bucket.width) for bucket in group[:3]}) == 3
    assert sorted(sizes[::2]) == [1, 2, 3]
    for request, actual in zip(requests, together, strict=True):
        alone = pipe(
            request.prompt, request.negative_prompt, seed=request.seed, num_inference_steps=2,
            guidance_scale=request.guidance_scale, height=request.height, width=request.width,
            output_type="latent",
        ).images  # fmt: skip
        assert actual.shape == alone.shape
        assert distance(actual, alone) < 1e-4  # two steps only; see FLOAT32
    images = pipe.generate_many(requests[:1], num_inference_steps=1)
    assert images[0].size == (requests[0].width, requests[0].height)


def test_many_requests_with_approximate_settings_stay_the_same(
    pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step cache's steps depend on the shape, so only one shape shares a batch then."""
    monkeypatch.setattr(pipe, "max_batch", 3)
    by_count: dict[int, list[Any]] = {}
    for bucket in buckets(256):
        by_count.setdefault(bucket.num_tokens, []).append(bucket)
    first, second = max(by_count.values(), key=len)[:2]
    requests = [
        Request(prompt=f"{SHORT} {i}", seed=i, height=bucket.height, width=bucket.width,
                guidance_scale=scale)
        for i, (bucket, scale) in enumerate([(first, 3.0), (second, 5.5), (first, 2.0), (first, 1)])
    ]  # fmt: skip
    values: dict[str, Any] = {
        "num_inference_steps": 6, "approximate": StepCache(0.3), "guidance_interval": (0.0, 0.5),
        "output_type": "latent",
    }  # fmt: skip
    sizes = []
    transformer = pipe.transformer

    class Recorder(Unshared):
        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            sizes.append(len(inputs["tokens"]))
            return self.inner(**inputs)

    pipe.transformer = Recorder(transformer)
    try:
        together = pipe.generate_many(requests, **values)
    finally:
        pipe.transformer = transformer
    assert set(sizes) == {1, 2} and len(sizes) < 3 * 6, "steps were skipped"
    exact = pipe.generate_many(requests, **{**values, "approximate": None})
    for request, actual, other in zip(requests, together, exact, strict=True):
        output = pipe(
            request.prompt, seed=request.seed, guidance_scale=request.guidance_scale,
            height=request.height, width=request.width, **values,
        )  # fmt: skip
        assert output.skipped_steps[0]
        assert distance(actual, output.images) < 1e-4
        assert distance(actual, other) > 1e-3, "it is approximate"
    by_content: dict[str, Any] = {**values, "approximate": FirstBlockCache(0.1)}
    for request, actual in zip(requests, pipe.generate_many(requests, **by_content), strict=True):
        alone = pipe(
            request.prompt, seed=request.seed, guidance_scale=request.guidance_scale,
            height=request.height, width=request.width, **by_content,
        ).images  # fmt: skip
        assert torch.equal(actual, alone), "a first-block cache decides for each image"


def test_prompts_of_several_batches_are_encoded_together(
    pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shapes, so four batches: two calls of the text encoder, short prompts and long ones."""
    shapes = [bucket for bucket in buckets(256) if bucket.num_tokens <= 256][:4]
    prompts = ["a dot", LONG, "a far dot", f"{LONG} and so on"]
    requests = [
        Request(prompt=prompt, height=bucket.height, width=bucket.width)
        for prompt, bucket in zip(prompts, shapes, strict=True)
    ]
    encoder = pipe.prompt_encoder
    assert encoder is not None
    monkeypatch.setattr(encoder, "max_batch", 2)
    encoder.cache.clear()
    calls, inner = [], encoder.text_encoder

    class Recorder(Unshared):
        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(inputs["input_ids"].shape))
            return self.inner(**inputs)

    monkeypatch.setattr(encoder, "text_encoder", Recorder(inner))
    together = pipe.generate_many(requests, num_inference_steps=1, output_type="latent")
    assert [rows for rows, _ in calls] == [2, 2]
    assert calls[0][1] == 16 < calls[1][1]
    for request, actual in zip(requests, together, strict=True):
        encoder.cache.clear()
        alone = pipe(request.prompt, num_inference_steps=1, height=request.height,
                     width=request.width, output_type="latent").images  # fmt: skip
        assert distance(actual, alone) < 1e-4


def test_prompts_on_disk_serve_the_next_process(pipe: PixArtPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    first = PixArtPipeline.from_bundle(pipe.folder, "cpu", check=False, prompt_cache=folder)
    expected = latents(first, frozenset(Saving), prompt=SHORT)
    assert first.prompt_encoder is not None and first.prompt_encoder.misses == 1
    files = list(folder.iterdir())
    assert len(files) == 1
    second = PixArtPipeline.from_bundle(pipe.folder, "cpu", check=False, prompt_cache=folder)
    encoder = second.prompt_encoder
    assert encoder is not None
    actual = latents(second, frozenset(Saving), prompt=SHORT)
    assert (encoder.misses, encoder.disk_hits) == (0, 1)
    assert distance(actual, expected) < FLOAT32
    files[0].write_bytes(files[0].read_bytes()[:40])
    third = PixArtPipeline.from_bundle(pipe.folder, "cpu", check=False, prompt_cache=folder)
    assert distance(latents(third, frozenset(Saving), prompt=SHORT), expected) < FLOAT32
    assert third.prompt_encoder is not None and third.prompt_encoder.misses == 1


def test_a_prompt_cache_that_cannot_be_kept_stops_no_request(
    pipe: PixArtPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the folder's place, as a full or read-only disk gives an error; one warning."""
    (tmp_path / "cache").write_text("mine")
    kept = PixArtPipeline.from_bundle(
        pipe.folder, "cpu", check=False, prompt_cache=tmp_path / "cache"
    )
    for prompt in (SHORT, "two stars"):
        latents(kept, frozenset(Saving), prompt=prompt)
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("change", ["weights", "length"])
def test_prompts_on_disk_are_of_one_text_encoder(
    pipe: PixArtPipeline, tmp_path: Path, change: str
) -> None:
    """Quantized weights have the files of the others, and PixArt's two families the same T5."""
    first = PixArtPipeline.from_bundle(pipe.folder, "cpu", check=False, prompt_cache=tmp_path)
    assert first.prompt_encoder is not None
    first.prompt_encoder([SHORT])
    manifest = first.manifest
    engine, model = manifest.engine_config, manifest.model_config
    if change == "weights":
        engine = {**engine, "text_weights": "int8"}
    else:
        model = {**model, "max_text_tokens": model["max_text_tokens"] - 20}
    other = replace(manifest, engine_config=engine, model_config=model)
    parts = {"text_encoder": first.prompt_encoder.text_encoder, "transformer": first.transformer,
             "vae_decoder": first.vae_decoder}  # fmt: skip
    second = PixArtPipeline(other, first.folder, parts, first.device, tmp_path)
    assert second.prompt_encoder is not None
    second.prompt_encoder([SHORT])
    assert (second.prompt_encoder.disk_hits, second.prompt_encoder.misses) == (0, 1)


def test_the_text_encoder_runs_at_the_length_of_the_longest_prompt(pipe: PixArtPipeline) -> None:
    encoder = pipe.prompt_encoder
    assert encoder is not None
    lengths = []
    inner = encoder.text_encoder

    def record(**inputs: torch.Tensor) -> torch.Tensor:
        lengths.append(inputs["input_ids"].shape[1])
        return inner(**inputs)

    encoder.text_encoder = record  # type: ignore[assignment]
    try:
        for words in (3, 20, 50, 118):
            encoder([" ".join(["circle"] * words) + "."])
    finally:
        encoder.text_encoder = inner
    assert lengths == sorted(lengths) and lengths[0] == 16 and lengths[-1] == 120
    assert set(lengths) <= {16, 32, 64, 120}


@pytest.mark.parametrize(("prompt", "negative"), [(SHORT, ""), (LONG, NEGATIVE)])
def test_in_bfloat16_they_round_no_worse(
    pipe: PixArtPipeline, half: PixArtPipeline, prompt: str, negative: str
) -> None:
    """Other roundings, so other last digits; but not further from float32 than without."""
    arguments = {"prompt": prompt, "negative_prompt": negative, "seed": 4}
    exact = latents(pipe, frozenset(), **arguments)
    plain = distance(latents(half, frozenset(), **arguments), exact)
    saved = distance(latents(half, frozenset(Saving), **arguments), exact)
    assert 0.01 < plain < 0.1, "bfloat16 over six steps"
    assert saved < 1.25 * plain
