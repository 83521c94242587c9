"""torch.compile's backend: compilations counted by a compiler that does nothing else; the limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_rt import PixArtPipeline
from pixart_rt.backends.pytorch import compiled
from pixart_rt.backends.pytorch.compiled import COMPILATIONS, CompiledBackend
from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig
from pixart_rt.errors import BackendError
from pixart_rt.export.build import build
from pixart_rt.export.onnx_export import transformer_inputs
from pixart_rt.inference.cuda_graphs import Graphs

from .conftest import CONFIG

CPU = torch.device("cpu")
T, C = 120, 32  # the random pipeline's text

pytestmark = [
    pytest.mark.usefixtures("no_kernels"),  # Triton's interpreter would take minutes
    # torch's own, when TorchInductor is first imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


class Counter:
    """A compiler for torch.compile that runs the graph as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(scope="module")
def bundle(pipeline_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "b"
    config = EngineConfig(resolution=256, backend="torch", max_batch=2)
    return build(str(pipeline_folder(32)), out, config).path


@pytest.fixture
def pipe(bundle: Path) -> PixArtPipeline:
    return PixArtPipeline.from_bundle(bundle, "cpu", check=False)


def load(bundle: Path, name: str) -> tuple[Any, Counter]:
    counter = Counter()
    component = CompiledBackend(counter).load(bundle, Manifest.read(bundle), name, CPU)
    return component, counter


def embeds(num_tokens: int, batch: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(num_tokens)
    values = torch.randn(batch, T, C, generator=random)
    return values, (torch.arange(T) < num_tokens).expand(batch, -1)


def requests() -> list[dict[str, Any]]:
    """Every form of the text × guidance × negative prompt, for one and two images of two shapes."""
    found = []
    for num_tokens in (1, 12, 40, 100):
        for negative in (None, 1, 12, 100):  # None: no guidance; 1: the empty prompt's one token
            for batch in (1, 2):
                prompt, mask = embeds(num_tokens, batch)
                values: dict[str, Any] = {"prompt_embeds": prompt, "prompt_attention_mask": mask}
                values["guidance_scale"] = 1.0 if negative is None else 4.5
                if negative is not None:
                    null, null_mask = embeds(negative, batch)
                    values["negative_prompt_embeds"] = null
                    values["negative_prompt_attention_mask"] = null_mask
                found += [{**values, "aspect_ratio": aspect} for aspect in ("1:1", "3:2")]
    return found


def test_every_request_shares_the_documented_number_of_compilations(
    pipe: PixArtPipeline, bundle: Path
) -> None:
    eager = pipe.transformer
    component, counter = load(bundle, "transformer")
    usual: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}
    for request in requests():
        pipe.transformer = eager
        expected = pipe(**request, **usual).images
        pipe.transformer = component
        actual = pipe(**request, **usual).images
        # The same operators; some batches are laid out differently, so that sums may differ.
        assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert counter.graphs == COMPILATIONS["transformer"]
    pipe.transformer = component  # another sampler takes other outputs, and more steps none
    pipe(**request, scheduler="iddpm", num_inference_steps=2, output_type="latent")
    assert counter.graphs == COMPILATIONS["transformer"]


def test_a_captured_request_compiles_nothing_more(
    pipe: PixArtPipeline, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's own tensors are of the kind that the request's are, inside inference mode."""

    class Recorded:
        num_bytes = 0

        def __init__(self, run: Any, inputs: Any) -> None:
            self._run, self._inputs = run, inputs
            self.output = run(inputs)

        def replay(self) -> None:
            self.output.copy_(self._run(self._inputs))

    pipe.transformer, counter = load(bundle, "transformer")
    pipe.denoiser.graphs = Graphs(capture=Recorded, automatic=True)
    monkeypatch.setattr(pipe.denoiser, "captures", lambda: True)
    prompt, mask = embeds(12, 1)
    for _ in range(3):
        pipe(
            prompt_embeds=prompt, prompt_attention_mask=mask, guidance_scale=1.0,
            num_inference_steps=2, output_type="latent",
        )  # fmt: skip
    assert pipe.denoiser.graphs.replays == 2
    assert counter.graphs == 1


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_other_components_compile_once_for_one_and_once_for_more(bundle: Path, name: str) -> None:
    component, counter = load(bundle, name)
    eager = PixArtPipeline.from_bundle(bundle, "cpu", check=False)
    for batch in (1, 2, 3):
        for size in (4, 8):  # the VAE's: below any at which PyTorch changes the convolution
            if name == "text_encoder":
                assert eager.prompt_encoder is not None
                ids = torch.arange(batch * size).view(batch, size) % 50
                inputs = {"input_ids": ids, "attention_mask": (ids > 3).long()}
                expected = eager.prompt_encoder.text_encoder(**inputs)
            else:
                inputs = {"latents": torch.randn(batch, 4, size, 5)}
                expected = eager.vae_decoder(**inputs)
            torch.testing.assert_close(component(**inputs), expected, atol=1e-5, rtol=1e-5)
    assert counter.graphs == COMPILATIONS[name]


def test_more_compilations_than_there_should_be_are_an_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile by itself would run eagerly from here on."""
    config = Manifest.read(bundle).config
    monkeypatch.setattr(compiled, "LIMIT", 2)
    monkeypatch.setattr(compiled, "DYNAMIC", {})  # every size is a compilation of its own
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for _ in range(2):  # a second pipeline has compilations of its own
            component, counter = load(bundle, "transformer")
            for num_tokens in (3, 4):
                component(**transformer_inputs(config, batch=2, num_tokens=num_tokens))
            with pytest.raises(BackendError, match=r"'tokens': \(2, 9, 16\).*--backend torch"):
                component(**transformer_inputs(config, batch=2, num_tokens=9))
            assert counter.graphs == 2
            again = transformer_inputs(config, batch=2, num_tokens=3)
            assert component(**again).isfinite().all(), "what was compiled still runs"
    assert not torch._dynamo.config.fail_on_recompile_limit_hit, "changed inside the call alone"


def test_rows_of_one_image_become_images() -> None:
    """Two texts of one image are two images with a text each."""
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=7)
    one = {
        **inputs,
        "null_rows": inputs["null_rows"][:0],
        "constant": inputs["constant"][:, :0],
        "text_rows": torch.tensor([0, 0]),
        **{name: inputs[name][:1] for name in ("tokens", "pos_embed", "modulation")},
    }
    changed = compiled.as_images(one)
    assert [len(changed[name]) for name in ("tokens", "pos_embed", "modulation")] == [2, 2, 2]
    assert changed["text_rows"].tolist() == [0, 1]
    assert torch.equal(changed["tokens"], one["tokens"].expand(2, -1, -1))
    guided = {**one, "null_rows": torch.tensor([0])}
    for same in (inputs, guided, {**one, "text_rows": torch.tensor([0])}):
        assert compiled.as_images(same) is same
