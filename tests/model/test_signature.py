"""The table of component inputs: what it makes, and that a new input is one row of it."""

from __future__ import annotations

import inspect
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from pixart_rt.backends.engine_files import part_inputs
from pixart_rt.checkpoints.bundle_module import DenoiserModule, TextEncoderModule
from pixart_rt.config import ModelConfig
from pixart_rt.export.onnx_export import export_onnx, transformer_graph, transformer_inputs
from pixart_rt.model.signature import (
    ABSORBED,
    ABSORBED_FORM,
    BOUNDS,
    CONTROLNET,
    SIGNATURES,
    Input,
    Signature,
    Values,
)
from pixart_rt.model.transformer import PixArtTransformer

CONFIG = ModelConfig(num_layers=2, num_heads=1, sample_size=32, caption_channels=32)
SIZES = {"batch": 3, "length": 5, "width": 4, "vocabulary": 9, "num_null": 0}


def test_modules_take_the_inputs_of_the_table() -> None:
    transformer = set(SIGNATURES["transformer"].names(CONTROLNET, ABSORBED_FORM))
    taken = set(inspect.signature(DenoiserModule.forward).parameters) - {"self", "cache"}
    assert taken == transformer
    text = tuple(inspect.signature(TextEncoderModule.forward).parameters)[1:]
    assert text == SIGNATURES["text_encoder"].names()


def test_kinds_of_inputs() -> None:
    signature = SIGNATURES["transformer"]
    assert "control" not in signature.names()
    assert set(signature.names(CONTROLNET)) - set(signature.names()) == {"control"}
    assert ABSORBED == ("absorbed_keys", "absorbed_bias", "absorbed_values")
    assert signature.dynamic()["text_kv"] == {1: "num_text"}
    assert signature.dynamic(ABSORBED_FORM)["absorbed_bias"] == {
        1: "num_text",
        3: "absorbed_length",
    }
    assert SIGNATURES["vae_decoder"].dynamic() == {
        "latents": {0: "batch", 2: "latent_height", 3: "latent_width"}
    }


def test_random_inputs_have_the_values_of_their_kind() -> None:
    signature = Signature(
        (
            Input("ids", ("batch", "length"), torch.int64, Values.TOKEN_IDS),
            Input("mask", ("batch", "length"), torch.int64, Values.PREFIX_MASK),
            Input("numbers", ("length",), torch.int64, Values.COUNT),
            Input("wide", ("batch", 1000), std=0.5),
            Input("none", ("num_null", "width")),
            Input("other", ("batch",), only="elsewhere"),
        ),
        "out",
        ("batch",),
    )
    made = signature.random(SIZES, generator=torch.Generator().manual_seed(0))
    assert tuple(made) == ("ids", "mask", "numbers", "wide", "none")  # the table's order
    assert made["numbers"].tolist() == [0, 1, 2, 3, 4]
    assert made["none"].shape == (0, 4)
    shown = made["mask"].sum(1)
    assert shown.min() >= 1
    assert torch.equal(made["mask"], (torch.arange(5) < shown[:, None]).long())
    assert torch.equal(made["ids"] > 0, made["mask"] > 0)
    assert made["ids"].max() < 9
    assert made["wide"].std() == pytest.approx(0.5, rel=0.1)


class Toy(DenoiserModule):
    """A denoiser with one input more."""

    def forward(  # torch.export wants every name
        self, tokens, pos_embed, modulation, null_rows, text_rows, constant, text_kv, prompt_mask,
        outputs, toy,
    ):  # fmt: skip
        noise = super().forward(
            tokens, pos_embed, modulation, null_rows, text_rows, constant, prompt_mask, outputs,
            text_kv,
        )  # fmt: skip
        return noise + toy[torch.cat([null_rows, text_rows]), None, None]


def test_a_new_input_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """It reaches the graph, its dynamic dimensions, the example inputs and the backends' names."""
    signature = SIGNATURES["transformer"]
    grown = replace(signature, inputs=(*signature.inputs, Input("toy", ("batch",))))
    monkeypatch.setitem(SIGNATURES, "transformer", grown)
    assert part_inputs("transformer", 0)[-1] == "toy"
    torch.manual_seed(0)
    core = PixArtTransformer(CONFIG).eval()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module = Toy(core)
    path = tmp_path / "toy.onnx"
    export_onnx(transformer_graph(module, CONFIG), path)
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in onnx.load(path, load_external_data=False).graph.input
    }
    assert shapes["toy"] == ["batch"]
    session = onnxruntime.InferenceSession(path)
    for batch, tokens in ((1, 5), (4, 77)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=tokens)
        assert inputs["toy"].shape == (batch,)
        with torch.no_grad():
            expected = module(**inputs)
        (actual,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=1e-4)


def test_bounds_are_those_of_named_dimensions() -> None:
    used = {
        dim
        for signature in SIGNATURES.values()
        for axes in signature.dynamic(CONTROLNET, ABSORBED_FORM).values()
        for dim in axes.values()
    }
    assert used == set(BOUNDS)
