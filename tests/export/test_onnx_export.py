"""Exported graphs against their modules: every size of batch and tokens, none of them baked in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from pixart_rt.buckets import RESOLUTIONS, buckets
from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.config import Kernels, ModelConfig
from pixart_rt.export.checkpoint_source import random_transformer
from pixart_rt.export.onnx_export import (
    Graph,
    export_onnx,
    export_program,
    text_encoder_graph,
    text_encoder_inputs,
    transformer_graph,
    transformer_inputs,
    vae_decoder_graph,
)
from pixart_rt.model.vae import VaeDecoder, read_vae

CONFIG = ModelConfig(num_layers=2, num_heads=1, caption_channels=40)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}  # of outputs with a spread near 1


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return torch.from_numpy(session(path).run(None, feed)[0])


def dimensions(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def transformer(request, tmp_path_factory) -> tuple[Graph, Path, torch.dtype]:
    graph = transformer_graph(DenoiserModule(random_transformer(CONFIG, request.param)), CONFIG)
    path = tmp_path_factory.mktemp("onnx") / "transformer.onnx"
    export_onnx(graph, path)
    return graph, path, request.param


@pytest.mark.parametrize(
    ("batch", "guided", "tokens"),
    [(1, 1, 231), (2, 0, 256), (3, 2, 1000), (1, 0, 3712), (5, 5, 2)],
)
def test_transformer_matches_at_every_size(
    transformer, batch: int, guided: int, tokens: int
) -> None:
    _, path, dtype = transformer
    inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=tokens, guided=guided)
    inputs["text_rows"] = inputs["text_rows"].flip(0)
    inputs["outputs"] = inputs["outputs"][batch::3]
    oracle = DenoiserModule(random_transformer(CONFIG, torch.float32))
    with torch.no_grad():
        expected = oracle(**inputs)
    actual = run(path, inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_transformer_names_its_inputs_and_dimensions(transformer) -> None:
    _, path, _ = transformer
    assert dimensions(path) == {
        "tokens": ["batch", "num_tokens", 16],
        "pos_embed": ["batch", "num_tokens", 72],
        "modulation": ["batch", 7, 72],
        "null_rows": ["num_null"],
        "text_rows": ["num_text"],
        "constant": [CONFIG.num_layers, "num_null", 1, 72],
        "text_kv": [CONFIG.num_layers, "num_text", 120, 2, 1, 72],
        "prompt_mask": ["num_text", 120],
        "outputs": ["num_outputs"],
        "noise": ["num_null + num_text", "num_tokens", "num_outputs"],
    }


def test_no_token_count_is_baked_in(transformer) -> None:
    """No bucket's N, nor the example's, stands in a constant of the graph."""
    graph, path, _ = transformer
    model = onnx.load(path)
    example = graph.example["tokens"].shape[1]
    forbidden = {b.num_tokens for r in RESOLUTIONS for b in buckets(r)} | {example}
    found = []
    weights = {name for name, _ in graph.module.named_parameters()}
    for tensor in model.graph.initializer:
        integers = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        if integers and tensor.name not in weights:
            values = set(onnx.numpy_helper.to_array(tensor).flatten().tolist())
            found += [(tensor.name, value) for value in values & forbidden]
    for node in model.graph.node:
        for attribute in node.attribute:
            values = {*attribute.ints, attribute.i}
            if attribute.type == onnx.AttributeProto.TENSOR:
                values = set(onnx.numpy_helper.to_array(attribute.t).flatten().tolist())
            found += [(node.name, value) for value in values & forbidden]
    assert not found
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        sizes = {dim.dim_value for dim in value.type.tensor_type.shape.dim}
        assert not sizes & forbidden, value.name


def test_no_path_of_the_building_machine_stays_in_the_graph(transformer) -> None:
    _, path, _ = transformer
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("bounds", [[0, 3], [0, 1, 3]], ids=["whole", "two parts"])
def test_text_encoder_matches(
    pipeline_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, bounds: list[int]
) -> None:
    folder = pipeline_folder(32) / "text_encoder"
    oracle = read_text_encoder(folder, torch.float32)
    paths = []
    for start, stop in pairwise(bounds):
        paths.append(tmp_path / f"{start}.onnx")
        export_onnx(
            text_encoder_graph(read_text_encoder(folder, dtype, start, stop), 120), paths[-1]
        )
    for batch in (1, 2, 5):
        inputs = text_encoder_inputs(oracle.config.vocab_size, batch=batch, num_tokens=120)
        value = run(paths[0], inputs)
        for path in paths[1:]:
            value = run(path, {"hidden": value, "attention_mask": inputs["attention_mask"]})
        expected = oracle(inputs["input_ids"], inputs["attention_mask"])
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(value, expected, atol=tolerance, rtol=tolerance)


def test_the_position_bias_is_folded_once(
    pipeline_folder: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = read_text_encoder(pipeline_folder(32) / "text_encoder", torch.float32)
    export_onnx(text_encoder_graph(encoder, 120), tmp_path / "t5.onnx")
    model = onnx.load(tmp_path / "t5.onnx")
    shape = [1, encoder.config.num_heads, 121, 121]  # one more than the longest text
    tables = [tensor for tensor in model.graph.initializer if list(tensor.dims) == shape]
    assert len(tables) == 1
    biggest = max(t.ByteSize() for t in model.graph.initializer if t not in tables)
    assert biggest < 1 << 20, "no second table hides under another shape"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_vae_decoder_matches(
    pipeline_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    vae = read_vae(pipeline_folder(32) / "vae")
    graph = vae_decoder_graph(VaeDecoder(vae).to(dtype), 4)
    export_onnx(graph, tmp_path / "vae.onnx")
    assert dimensions(tmp_path / "vae.onnx")["latents"] == [
        "batch", 4, "latent_height", "latent_width"
    ]  # fmt: skip
    oracle = read_vae(pipeline_folder(32) / "vae")
    for shape in [(1, 4, 17, 9), (2, 4, 8, 31), (3, 4, 2, 2), (1, 4, 64, 64)]:
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        actual = run(tmp_path / "vae.onnx", {"latents": latents})
        expected = oracle.decode(latents / oracle.config.scaling_factor).sample
        tolerance = 3 * TOLERANCE[dtype]  # the decoder is deeper
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_fused_operators_become_standard_ones(tmp_path) -> None:
    """A module on the fused operators exports to what its reference computes."""
    model = random_transformer(CONFIG, torch.float32)
    plain = DenoiserModule(random_transformer(CONFIG, torch.float32))
    graph = transformer_graph(DenoiserModule(model.use(Kernels.FUSED)), CONFIG)
    program = export_program(graph)
    ours = {str(node.target) for node in program.graph.nodes if "pixart_rt" in str(node.target)}
    assert {name.split(".")[1] for name in ours} >= {
        "ln_modulate", "attention_qkv_packed", "cross_attention", "linear_gate_residual",
        "linear_gelu",
    }  # fmt: skip
    export_onnx(graph, tmp_path / "fused.onnx")
    nodes = onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node
    assert not [node for node in nodes if "pixart" in node.domain + node.op_type]
    random = torch.Generator().manual_seed(0)
    for batch, tokens in ((1, 231), (3, 37)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=tokens, generator=random)
        with torch.no_grad():
            expected = plain(**inputs)
        actual = run(tmp_path / "fused.onnx", inputs)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
