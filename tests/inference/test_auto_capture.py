"""Graphs that repeated shapes get automatically: when, of what, how many, and after failures.

A graph here is a run kept with the tensors it was captured on, which is all that a CUDA graph is to
its caller. The device of a real one is tested on a stand-in for torch.cuda that knows what is
current; tests/test_gpu.py has the real thing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_rt import PixArtPipeline, Request
from pixart_rt.config import EngineConfig
from pixart_rt.export.build import build
from pixart_rt.inference import cuda_graphs
from pixart_rt.inference.cuda_graphs import MAX_SEEN, CudaGraph, GraphKey, Graphs

STEPS = 2
PROMPT = "a red circle above a blue square"


class Recorded:
    """What a CUDA graph does, on the CPU; one that was told to fails."""

    fails: BaseException | None = None

    def __init__(self, run: Any, inputs: Any) -> None:
        if Recorded.fails is not None:
            raise Recorded.fails
        self._run, self._inputs = run, inputs
        self.output = run(inputs).clone()
        self.num_bytes = 1000

    def replay(self) -> None:
        self.output.copy_(self._run(self._inputs))


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "fails", None)


@dataclass(frozen=True)
class One:
    """The inputs of a run on one tensor."""

    x: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x}

    def with_tensors(self, tensors: dict[str, Tensor]) -> One:
        return One(**tensors)


def double(inputs: One) -> Tensor:
    return inputs.x * 2


class Asker:
    """Asks one `Graphs` as its owners do, a request at a time, and counts the eager runs."""

    def __init__(self, **options: Any) -> None:
        self.graphs: Graphs[One] = Graphs(capture=Recorded, **{"automatic": True, **options})
        self.eager = 0

    def __call__(self, size: int, weights: int = 0, *, capturable: bool = True) -> None:
        self.graphs.begin()
        inputs = One(torch.randn(size))
        run = double if capturable else None
        output = self.graphs.recall(GraphKey.of(inputs, weights), run, inputs)
        if output is None:
            self.eager += 1
            output = double(inputs)
        assert torch.equal(output, inputs.x * 2)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.eager, self.graphs.captures, self.graphs.replays


def test_the_second_request_captures_and_the_third_replays() -> None:
    ask = Asker()
    for expected in ((1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)):
        ask(4)
        assert ask.counts == expected


def test_each_key_has_a_second_request_of_its_own() -> None:
    ask = Asker()
    for size in (4, 5, 6, 4, 6, 5, 4):
        ask(size)
    assert ask.counts == (3, 3, 4)


def test_what_one_request_asks_twice_waits_for_the_next() -> None:
    ask = Asker()
    inputs = One(torch.randn(4))
    ask.graphs.begin()
    for _ in range(3):
        assert ask.graphs.recall(GraphKey.of(inputs, 0), double, inputs) is None
    assert ask.graphs.captures == 0
    ask(4)
    assert ask.counts == (0, 1, 1)


@pytest.mark.parametrize("options", [{"automatic": False}, {}])
def test_nothing_is_captured_when_switched_off_or_impossible(options: dict[str, bool]) -> None:
    ask = Asker(**options)
    for _ in range(4):
        ask(4, capturable="automatic" in options)
    assert ask.counts == (4, 0, 0)
    assert ask.graphs.num_seen == 0


def test_a_changed_weight_begins_again() -> None:
    ask = Asker()
    for weights in (0, 0, 1, 1, 1):
        ask(4, weights)
    assert ask.counts == (2, 2, 3)
    assert len(ask.graphs) == 1, "the older weights' graph is gone"
    ask(5, 0)
    ask(5, 1)
    ask(5, 0)
    assert ask.graphs.captures == 2, "weights that alternate are never the same twice in a row"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no 2.00 GiB are free\nmore"), RuntimeError("no graph can")]
)
def test_a_capture_that_fails_loses_no_request_and_is_not_tried_again(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Asker()
    ask(4)
    monkeypatch.setattr(Recorded, "fails", error)
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        ask(4)
    assert len(caught) == 1
    monkeypatch.setattr(Recorded, "fails", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(4)
        ask(4)
    assert ask.counts == (4, 0, 0)
    ask(5)
    ask(5)
    assert ask.counts == (5, 1, 1), "other keys are captured as ever"


def test_the_first_of_two_errors_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside a capture makes torch.cuda.graph's end fail as well."""
    second = RuntimeError("capture_end: the capture is invalid")
    second.__context__ = RuntimeError("operation not permitted when stream is capturing")
    ask = Asker()
    ask(4)
    monkeypatch.setattr(Recorded, "fails", second)
    with pytest.warns(RuntimeWarning, match="operation not permitted"):
        ask(4)


def test_more_shapes_than_fit_are_not_captured_in_turn_for_ever() -> None:
    ask = Asker(max_bytes=2 * 1100)
    for _ in range(5):
        for size in (4, 5, 6):
            ask(size)
    assert ask.graphs.captures == 3, "each once; the evicted one runs eagerly from then on"
    assert len(ask.graphs) == 2 and ask.graphs.num_bytes <= 2 * 1100
    assert ask.counts == (3 + 3, 3, 3 + 3 * 2)


def test_remembered_keys_are_bounded() -> None:
    ask = Asker()
    for size in range(1, MAX_SEEN + 20):
        ask(size)
    assert ask.graphs.num_seen == MAX_SEEN
    ask(MAX_SEEN + 19)
    assert ask.graphs.captures == 1, "the latest are remembered"
    ask(1)
    assert ask.graphs.captures == 1, "the oldest are forgotten"


# The pipeline around them.


@pytest.fixture(scope="module")
def bundle(pipeline_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto") / "b"
    config = EngineConfig(resolution=256, backend="torch", max_batch=2)
    return build(str(pipeline_folder(32)), out, config).path


@pytest.fixture
def pipe(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, no_kernels: None
) -> Iterator[PixArtPipeline]:
    """On the CPU, where both halves may be captured by the stand-in."""
    made = PixArtPipeline.from_bundle(bundle, "cpu", check=False)
    stand_in(made, monkeypatch)
    yield made


def stand_in(pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipe.prompt_encoder is not None
    for owner in (pipe.denoiser, pipe.prompt_encoder):
        owner.graphs._capture = Recorded
    monkeypatch.setattr(pipe.denoiser, "captures", lambda: True)
    monkeypatch.setattr(pipe.prompt_encoder.text_encoder, "capturable", True)


def counts(pipe: PixArtPipeline) -> tuple[int, int, int, int]:
    """Captures and replays of the loop, then of the text encoder."""
    assert pipe.prompt_encoder is not None
    loop, text = pipe.denoiser.graphs, pipe.prompt_encoder.graphs
    return loop.captures, loop.replays, text.captures, text.replays


def run(pipe: PixArtPipeline, prompt: str, **arguments: Any) -> Tensor:
    usual = {"num_inference_steps": STEPS, "output_type": "latent"}
    images: Tensor = pipe(prompt, **{**usual, **arguments}).images
    return images


PROMPTS = ["a red circle", "a blue circle", "a red square", "a green square"]


def test_a_repeated_request_is_captured_and_draws_the_same(
    pipe: PixArtPipeline, bundle: Path
) -> None:
    """README's example, again and again with other prompts and seeds, without `warmup`."""
    plain = PixArtPipeline.from_bundle(bundle, "cpu", check=False, auto_capture=False)
    expected_counts = [(0, 0, 0, 0), (1, 1, 1, 1), (1, 2, 1, 2), (1, 3, 1, 3)]
    for seed, (prompt, expected) in enumerate(zip(PROMPTS, expected_counts, strict=True)):
        actual = run(pipe, prompt, seed=seed)
        assert counts(pipe) == expected
        assert torch.equal(actual, run(plain, prompt, seed=seed))


def test_prompt_and_negative_prompt_of_one_request_are_not_two(pipe: PixArtPipeline) -> None:
    run(pipe, "a red circle", negative_prompt="a blue square")
    assert counts(pipe) == (0, 0, 0, 0), "both are one prompt at the same length"
    run(pipe, "a red square", negative_prompt="a blue circle")
    assert counts(pipe) == (1, 1, 1, 2)


def test_batches_of_one_call_count_as_requests_of_the_loop(pipe: PixArtPipeline) -> None:
    pipe.max_batch = 1
    run(pipe, PROMPT, num_images_per_prompt=4)
    assert counts(pipe) == (1, 3, 0, 0)
    pipe.generate_many(
        [Request(prompt=PROMPT, seed=seed) for seed in range(4)],
        num_inference_steps=STEPS, output_type="latent",
    )  # fmt: skip
    assert counts(pipe)[:2] == (1, 3 + 4)


def test_a_callback_is_always_called(pipe: PixArtPipeline) -> None:
    called = []
    for _ in range(3):
        run(pipe, PROMPT, callback_on_step_end=lambda *arguments: called.append(arguments[1]))
    assert called == [*range(STEPS)] * 3
    assert counts(pipe)[:2] == (0, 0)


def test_the_flag_switches_both_off(
    bundle: Path, pipe: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = PixArtPipeline.from_bundle(bundle, "cpu", check=False, auto_capture=False)
    stand_in(off, monkeypatch)
    assert not off.auto_capture and not off.captures and pipe.auto_capture and pipe.captures
    for prompt in PROMPTS[:3]:
        run(off, prompt)
    assert counts(off) == (0, 0, 0, 0)
    off.auto_capture = True
    for prompt in ("a star", "two stars"):
        run(off, prompt)
    assert counts(off) == (1, 1, 1, 1)
    off.auto_capture = False
    run(off, "three stars")
    assert counts(off) == (1, 2, 1, 2), "what is captured is still replayed"


def test_a_failed_capture_draws_the_image_all_the_same(
    pipe: PixArtPipeline, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PixArtPipeline.from_bundle(bundle, "cpu", check=False, auto_capture=False)
    run(pipe, PROMPTS[0])
    monkeypatch.setattr(Recorded, "fails", torch.OutOfMemoryError("the memory is full"))
    with pytest.warns(RuntimeWarning, match="memory is full") as caught:
        actual = run(pipe, PROMPTS[1], seed=1)
    assert len(caught) == 2, "the text encoder and the loop, once each"
    assert torch.equal(actual, run(plain, PROMPTS[1], seed=1))
    assert torch.equal(run(pipe, PROMPTS[2], seed=2), run(plain, PROMPTS[2], seed=2))
    assert counts(pipe) == (0, 0, 0, 0)


# The device of a real capture.


class FakeCuda:
    """torch.cuda's current device and streams, and what each call found current."""

    def __init__(self) -> None:
        self.device, self.streams = 0, {0: "main 0", 1: "main 1"}
        self.log: list[tuple[str, int, Any]] = []
        self.end_fails = False

    def note(self, what: str) -> None:
        self.log.append((what, self.device, self.streams[self.device]))

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    def stream(self, device: torch.device) -> Any:
        name = f"side {device.index}"
        return SimpleNamespace(
            name=name, index=device.index, wait_stream=lambda other: self.note(f"{name} waits")
        )

    def current_stream(self, device: torch.device) -> Any:
        stream = self.stream(device)
        stream.name = self.streams[device.index]
        return stream

    def set_stream(self, stream: Any) -> None:
        self.device, self.streams[stream.index] = stream.index, stream.name

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        device, before = self.device, self.streams[stream.index]
        self.set_stream(stream)
        yield
        self.device, self.streams[stream.index] = device, before

    @contextlib.contextmanager
    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.note("synchronize")  # as the real one, of whatever is current
        assert capture_error_mode == "thread_local"
        enter = self.on_stream(stream)
        enter.__enter__()
        try:
            yield
        finally:
            if self.end_fails:  # the real one leaves its stream current
                raise RuntimeError("capture_end failed")
            enter.__exit__(None, None, None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    for name, value in {
        "device": fake.on_device,
        "Stream": fake.stream,
        "current_stream": fake.current_stream,
        "set_stream": fake.set_stream,
        "stream": fake.on_stream,
        "graph": fake.graph,
        "synchronize": lambda device: fake.note(f"synchronize {device.index}"),
        "empty_cache": lambda: fake.note("empty_cache"),
        "memory_reserved": lambda device: 7 * len(fake.log) * (device.index == 1),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: fake.note("replay")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cuda_graphs._capture_stream.cache_clear()
    yield fake
    cuda_graphs._capture_stream.cache_clear()


def on_second_device() -> Any:
    """Inputs whose only tensor says that it is on cuda:1."""
    tensor = SimpleNamespace(device=torch.device("cuda", 1))
    return SimpleNamespace(tensors=lambda: {"x": tensor})


def test_a_graph_is_captured_and_replayed_on_its_tensors_device(cuda: FakeCuda) -> None:
    graph = CudaGraph(lambda inputs: cuda.note("run"), on_second_device())  # type: ignore
    assert [entry for entry in cuda.log if entry[0] == "run"] == [("run", 1, "side 1")] * 2
    assert ("synchronize", 1, "main 1") in cuda.log and ("empty_cache", 1, "main 1") in cuda.log
    assert {device for _, device, _ in cuda.log} == {1}
    assert graph.num_bytes > 0, "measured on cuda:1"
    assert (cuda.device, cuda.streams) == (0, {0: "main 0", 1: "main 1"})
    graph.replay()
    assert cuda.log[-1] == ("replay", 1, "main 1")
    assert cuda.device == 0


def test_a_failed_end_of_a_capture_leaves_the_caller_on_its_stream(cuda: FakeCuda) -> None:
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="capture_end"):
        CudaGraph(lambda inputs: cuda.note("run"), on_second_device())  # type: ignore
    assert cuda.streams == {0: "main 0", 1: "main 1"}
    assert cuda_graphs._capture_stream.cache_info().currsize == 0, "the next has another stream"
