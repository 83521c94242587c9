"""The text encoder's graphs: one for each number of prompts and length, and none that is stale.

A graph here is a run kept with the tensors it was captured on, which is all that a CUDA graph is to
its caller. No GPU is needed, and none has run the real ones.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_rt import PixArtPipeline
from pixart_rt.backends.engine_files import Chain, FunctionPart, part_inputs
from pixart_rt.bench.request import BenchRequest
from pixart_rt.bench.systems import Ours
from pixart_rt.checkpoints.bundle_module import TextEncoderModule
from pixart_rt.config import EngineConfig, TextPlace, text_lengths
from pixart_rt.export.build import build
from pixart_rt.inference.bundle_components import PlacedComponent
from pixart_rt.inference.cuda_graphs import Graphs
from pixart_rt.inference.prompt_embeds import PromptEmbeds
from pixart_rt.inference.prompts import PromptEncoder, TextTokens
from pixart_rt.model.text_encoder import T5Config, T5Encoder

LONGEST = 40  # lengths 16, 32 and 40
T5 = T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=2)


class Recorded:
    """What a CUDA graph does, on the CPU: it knows only the tensors that it was made with."""

    num_bytes = 1000

    def __init__(self, run: Any, inputs: TextTokens) -> None:
        self._run, self._inputs = run, inputs
        with torch.inference_mode(False):  # launches may write to it anywhere
            self.output = run(inputs).clone()

    def replay(self) -> None:
        self.output.copy_(self._run(self._inputs))


def tokenize(prompts: list[str]) -> Any:
    """A token a word, its number; then padding."""
    ids = torch.zeros(len(prompts), LONGEST, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        words = torch.tensor([int(word) for word in prompt.split()])
        ids[row, : len(words)] = words
    return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


class Tokenizer:
    max_tokens = LONGEST

    def __call__(self, prompts: list[str]) -> Any:
        return tokenize(prompts)


@pytest.fixture
def module() -> TextEncoderModule:
    torch.manual_seed(0)
    module = TextEncoderModule(T5Encoder(T5)).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module


def component(module: TextEncoderModule, calls: list[Any], capturable: bool = True) -> Chain:
    """The encoder, and the shapes it was called with."""

    def call(**inputs: Tensor) -> Tensor:
        calls.append(tuple(inputs["input_ids"].shape))
        result: Tensor = module(**inputs)
        return result

    parts = [FunctionPart(call, part_inputs("text_encoder", 0))]
    return Chain("text_encoder", parts, module=module, capturable=capturable)


def encoder(text_encoder: Any) -> PromptEncoder:
    made = PromptEncoder(Tokenizer(), text_encoder, torch.device("cpu"), 4)  # type: ignore[arg-type]
    made.graphs = Graphs(capture=Recorded)
    return made


@pytest.fixture(scope="module")
def torch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "b"
    return build("tiny", folder, EngineConfig(resolution=256, backend="torch", max_batch=2)).path


def words(count: int, seed: int) -> str:
    ids = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(str(int(each)) for each in ids)


def check(actual: PromptEmbeds, module: TextEncoderModule, prompts: list[str]) -> None:
    """Against the module itself at full length, at the prompts' own tokens."""
    tokens = tokenize(prompts)
    with torch.no_grad():
        expected = module(tokens.input_ids, tokens.attention_mask)
    own = tokens.attention_mask.bool()
    assert torch.equal(actual.mask, own)
    torch.testing.assert_close(actual.embeds[own], expected[own], atol=1e-5, rtol=1e-5)  # float32


@pytest.mark.parametrize("counts", [(1,), (16,), (17,), (40,), (3, 31), (2, 2)])
def test_a_replay_gives_the_new_prompts_embeddings(
    module: TextEncoderModule, counts: tuple[int, ...]
) -> None:
    mine = encoder(component(module, []))
    mine.warm(len(counts))
    assert mine.graphs.captures == len(text_lengths(LONGEST)) == 3
    for seed in (1, 2, 3):
        prompts = [words(count, 10 * seed + row) for row, count in enumerate(counts)]
        check(mine(prompts), module, prompts)
        assert mine.graphs.replays == seed


def test_embeddings_outlive_the_next_replay(module: TextEncoderModule) -> None:
    mine = encoder(component(module, []))
    mine.warm(1)
    first, second = words(5, 1), words(5, 2)
    kept = mine([first])
    mine([second])
    check(kept, module, [first])
    check(mine([first]), module, [first])
    assert mine.graphs.replays == 2, "the third comes from the cache of prompts"


def test_nothing_is_captured_unless_asked_nor_twice(module: TextEncoderModule) -> None:
    mine = encoder(component(module, []))
    mine([words(5, 1)])
    assert mine.graphs.captures == 0
    mine.warm(1)
    mine.warm(1)
    assert mine.graphs.captures == 3
    mine.warm(2)
    assert mine.graphs.captures == 6


def test_shapes_that_were_not_captured_run_eagerly(module: TextEncoderModule) -> None:
    calls: list[Any] = []
    mine = encoder(component(module, calls))
    mine.warm(1)
    calls.clear()
    prompts = [words(20, 1), words(4, 2)]
    check(mine(prompts), module, prompts)
    assert calls == [(2, 32)] and mine.graphs.replays == 0


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_changed_weight_is_never_replayed(module: TextEncoderModule, change: str) -> None:
    mine = encoder(component(module, []))
    mine.warm(1)
    mine([words(5, 1)])
    layer: Any = module.encoder.layers[1]
    if change == "in place":
        layer.wo.weight.mul_(1.5)
    else:
        layer.wo.weight = torch.nn.Parameter(layer.wo.weight * 1.5, requires_grad=False)
    check(mine([words(5, 2)]), module, [words(5, 2)])
    assert mine.graphs.replays == 1
    mine.warm(1)
    assert len(mine.graphs) == 3, "the graphs of older weights are gone"
    check(mine([words(5, 3)]), module, [words(5, 3)])
    assert mine.graphs.replays == 2


def test_another_text_encoder_has_no_graph(module: TextEncoderModule) -> None:
    """Engines have no version to tell them apart, so the graph belongs to the component itself."""
    calls: list[Any] = []
    mine = encoder(component(module, []))
    mine.warm(1)
    mine.text_encoder = component(module, calls)
    mine([words(5, 1)])
    assert calls == [(1, 16)] and mine.graphs.replays == 0


def test_the_least_used_length_goes_beyond_the_bound(module: TextEncoderModule) -> None:
    mine = encoder(component(module, []))
    mine.graphs.max_bytes = 2 * 1000 + 2 * 2 * 8 * LONGEST  # two graphs with their tokens
    mine.warm(1)
    assert (mine.graphs.captures, len(mine.graphs)) == (3, 2)
    mine([words(5, 1)])
    assert mine.graphs.replays == 0, "length 16 was captured first"
    mine([words(20, 1)])
    assert mine.graphs.replays == 1


def test_what_cannot_be_captured_is_not(module: TextEncoderModule) -> None:
    plain = component(module, [], capturable=False)  # engines, and an offloaded encoder
    on_host = PlacedComponent(component(module, []), torch.device("cpu"))  # as a pipeline on a GPU
    for text_encoder in (plain, on_host):
        mine = encoder(text_encoder)
        mine.warm(1)
        assert mine.graphs.captures == 0
    assert PlacedComponent(component(module, []), torch.device("cuda")).capturable


def test_warmup_counts_the_graphs_that_are_kept(
    torch_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = PixArtPipeline.from_bundle(torch_bundle, "cpu", check=False)
    text = pipe.prompt_encoder
    assert text is not None
    text.graphs = Graphs(capture=Recorded, max_bytes=1)  # the latest alone
    monkeypatch.setattr(text.text_encoder, "capturable", True)
    monkeypatch.setattr(pipe, "vae_decoder", lambda **_: None)
    assert pipe.warmup(["1:1"], num_inference_steps=1, prompts=[], progress=lambda *_: None) == 1
    assert "graphs were captured, 1 are kept" in caplog.text


def test_warmup_fills_them_and_a_request_replays(
    torch_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = PixArtPipeline.from_bundle(torch_bundle, "cpu", check=False)
    values: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "seed": 3}
    expected = pipe("a red circle", **values).images
    warm: dict[str, Any] = {
        "num_inference_steps": 1,
        "prompts": ["a star"],
        "progress": lambda *_: None,
    }
    assert pipe.warmup(["1:1"], **warm) == 0, "no CUDA graph on a CPU"
    pipe = PixArtPipeline.from_bundle(torch_bundle, "cpu", check=False)
    text = pipe.prompt_encoder
    assert text is not None
    text.graphs = Graphs(capture=Recorded)
    monkeypatch.setattr(text.text_encoder, "capturable", True)
    assert pipe.warmup(["1:1"], **warm) == len(text_lengths(text.tokenizer.max_tokens))
    decoded: list[tuple[int, ...]] = []
    inner = pipe.vae_decoder

    def decode(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(tuple(latents.shape))
        return inner(latents=latents)

    monkeypatch.setattr(pipe, "vae_decoder", decode)
    assert pipe.warmup(["1:1"], batch_size=2, **warm) == len(text_lengths(120))
    assert decoded == [(2, 4, 32, 32)], "the decoder is warmed up too"
    before = text.graphs.replays
    actual = pipe("a red circle", **values).images
    assert text.graphs.replays == before + 1
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    text(["a blue square, a green star"])  # outside inference mode, as a user may
    assert text.graphs.replays == before + 2


def test_a_replay_counts_as_the_text_encoder_s_time(
    torch_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench` must not put it into the denoising, whose first call is no mark where it replays."""
    ours = Ours(BenchRequest(bundle=torch_bundle, steps=1))
    text = ours.pipe.prompt_encoder
    assert text is not None
    text.graphs = Graphs(capture=Recorded)
    monkeypatch.setattr(text.text_encoder, "capturable", True)
    ours.prepare(1)
    replays = text.graphs.replays
    _, seconds = ours(["a red circle"], [0])
    assert text.graphs.replays == replays + 1
    assert seconds["text_encoder"] > 0


def test_an_offloaded_encoder_is_never_captured(torch_bundle: Path) -> None:
    pipe = PixArtPipeline.from_bundle(
        torch_bundle, "cpu", check=False, text_place=TextPlace.OFFLOAD
    )
    assert pipe.prompt_encoder is not None
    inner: Any = pipe.prompt_encoder.text_encoder
    assert not inner.component.capturable
