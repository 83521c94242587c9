"""Where a pipeline's components are put, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pixart_rt.backends import loading
from pixart_rt.backends.loading import Loader
from pixart_rt.backends.pytorch.offload import Offloaded
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints import bundle_module
from pixart_rt.checkpoints.bundle_module import save_module
from pixart_rt.config import TextPlace, Weights
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.model.transformer import PixArtTransformer

from .conftest import CONFIG, T5, TEXT_TOKENS

Made = tuple[Path, Manifest]


@pytest.fixture
def text_bundle(
    make_bundle: Callable[..., Made], text_encoders: tuple[nn.Module, ...], tmp_path: Path
) -> Made:
    (tmp_path / "text_encoder").mkdir()
    save_module(tmp_path / "text_encoder", text_encoders[0], T5)
    return make_bundle("text_encoder", ("text_encoder/model.safetensors",), backend="torch")


def text_inputs() -> dict[str, torch.Tensor]:
    mask = (torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [3]])).long()
    return {"input_ids": torch.arange(2 * TEXT_TOKENS).view(2, -1), "attention_mask": mask}


def test_an_offloaded_encoder_equals_a_resident_one(
    text_bundle: Made, text_encoders: tuple[nn.Module, ...]
) -> None:
    expected = text_encoders[0](**text_inputs())
    for place in TextPlace:
        component, device = Loader(place).load(*text_bundle, "text_encoder", "cpu")
        assert device.type == "cpu"
        assert torch.equal(component(**text_inputs()), expected)


def test_offloaded_weights_go_to_the_device_for_the_call_alone(
    text_encoders: tuple[nn.Module, ...],
) -> None:
    """On the meta device, which computes nothing, but refuses weights that stayed on the CPU."""
    module = text_encoders[0]
    before = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
    inputs = {name: tensor.to("meta") for name, tensor in text_inputs().items()}
    output = Offloaded(module, torch.device("meta"))(**inputs)
    assert output.device.type == "meta"
    assert {name: tensor.data_ptr() for name, tensor in module.named_parameters()} == before


def test_the_bundle_s_own_choice_holds_unless_another_is_asked(text_bundle: Made) -> None:
    folder, manifest = text_bundle
    manifest = replace(manifest, engine_config={"text_place": "cpu"})
    _, device = Loader().load(folder, manifest, "text_encoder", "meta")
    assert device.type == "cpu"
    assert manifest.text_place is TextPlace.CPU


def test_only_plain_pytorch_can_be_offloaded(text_bundle: Made) -> None:
    folder, manifest = text_bundle
    entry = replace(manifest.components["text_encoder"], backend="onnxruntime")
    manifest = replace(manifest, components={"text_encoder": entry})
    with pytest.raises(BackendError, match=r"onnxruntime.*--text-encoder torch"):
        Loader(TextPlace.OFFLOAD).load(folder, manifest, "text_encoder", "cpu")


def test_quantized_weights_are_made_when_a_bundle_is_loaded(
    text_bundle: Made, text_encoders: tuple[nn.Module, ...]
) -> None:
    """Files hold the originals; int8 is within 2 % of them, and is not them."""
    folder, manifest = text_bundle
    manifest = replace(manifest, engine_config={"text_weights": "int8"})
    component, _ = Loader().load(folder, manifest, "text_encoder", "cpu")
    actual, expected = component(**text_inputs()), text_encoders[0](**text_inputs())
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.02
    assert manifest.weights_of("text_encoder") is Weights.INT8
    assert manifest.weights_of("vae_decoder") is Weights.FULL


def test_a_manifest_with_weights_that_do_not_exist_is_refused(text_bundle: Made) -> None:
    folder, manifest = text_bundle
    changed = replace(manifest, engine_config={"text_weights": "int3"})
    (folder / "manifest.json").write_text(changed.to_json())
    with pytest.raises(BundleError, match="int3"):
        Manifest.read(folder)


def test_components_of_one_backend_share_its_object(
    text_bundle: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's object holds the arena; another pipeline has another."""
    made: list[str] = []
    real = loading.get_backend

    def counting(name: str) -> Any:
        made.append(name)
        return real(name)

    monkeypatch.setattr(loading, "get_backend", counting)
    loader = Loader()
    for _ in range(2):
        loader.load(*text_bundle, "text_encoder", "cpu")
    assert made == ["torch"]
    Loader().load(*text_bundle, "text_encoder", "cpu")
    assert made == ["torch", "torch"]


def test_cuda_graphs_are_refused_where_no_engine_has_them(text_bundle: Made) -> None:
    with pytest.raises(BackendError, match="--backend tensorrt-rtx"):
        Loader(cuda_graphs=True).load(*text_bundle, "text_encoder", "cpu")


def test_weights_are_quantized_before_they_go_to_the_device(
    text_bundle: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else loading would take more memory there than the plan says."""
    folder, manifest = text_bundle
    manifest = replace(manifest, engine_config={"text_weights": "int8"})
    seen: list[set[str]] = []
    real = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        seen.append(
            {type(p).__name__ for n, p in module.named_parameters() if n.endswith("q.weight")}
        )
        return real(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    Loader().load(folder, manifest, "text_encoder", "cpu")
    assert seen[-1] == {"Int8Tensor"}


def test_nothing_requires_a_gradient_when_the_kernels_are_chosen(
    make_bundle: Callable[..., Made],
    transformer: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By it the self-test decides whether to compile the backward kernels too."""
    (tmp_path / "transformer").mkdir()
    save_module(tmp_path / "transformer", transformer, CONFIG)
    folder, manifest = make_bundle(
        "transformer", ("transformer/model.safetensors",), backend="torch"
    )
    seen: list[bool] = []
    real = PixArtTransformer.use

    def use(core: PixArtTransformer, *args: Any) -> PixArtTransformer:
        seen.append(any(parameter.requires_grad for parameter in core.parameters()))
        return real(core, *args)

    monkeypatch.setattr(PixArtTransformer, "use", use)
    real_load = bundle_module.load_module
    monkeypatch.setattr(  # as a loader that forgot it
        bundle_module, "load_module", lambda *args: real_load(*args).requires_grad_(True)
    )
    Loader().load(folder, manifest, "transformer", "cpu")
    assert seen == [False]
