"""ONNX Runtime on real exported graphs, against PyTorch float32."""

from types import SimpleNamespace

import pytest
import torch

from pixart_rt.backends import get_backend
from pixart_rt.backends.onnx_runtime import OnnxRuntimeBackend
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export.onnx_export import (
    export_onnx,
    text_encoder_graph,
    text_encoder_inputs,
    transformer_graph,
    transformer_inputs,
    vae_decoder_graph,
)

from .conftest import CONFIG, T5, TEXT_TOKENS

CPU = torch.device("cpu")
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums in another order


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, transformer, vae_decoder, text_encoders):
    """All components as ONNX, exported once."""
    root = tmp_path_factory.mktemp("graphs")
    export_onnx(transformer_graph(transformer, CONFIG), root / "transformer.onnx")
    export_onnx(vae_decoder_graph(vae_decoder, 4), root / "vae_decoder.onnx")
    for index, module in enumerate(text_encoders[1:]):
        export_onnx(text_encoder_graph(module.encoder, TEXT_TOKENS), root / f"text-{index}.onnx")
    return root


@pytest.fixture
def load(graphs, make_bundle, tmp_path):
    """The ONNX Runtime component made of these graphs."""

    def load_component(name, *files):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            for source in (graphs / file, graphs / f"{file}.data"):
                if source.exists():
                    (folder / source.name).write_bytes(source.read_bytes())
        bundle, manifest = make_bundle(name, tuple(f"{name}/{file}" for file in files))
        return get_backend("onnxruntime").load(bundle, manifest, name, CPU)

    return load_component


def test_transformer_at_several_sizes(load, transformer):
    component = load("transformer", "transformer.onnx")
    for batch, num_tokens in ((1, 2), (2, 37), (3, 64), (1, 231)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=num_tokens)
        actual = component(**inputs)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, transformer(**inputs), **TOLERANCE)


def test_inputs_need_not_be_contiguous_nor_float32(load, transformer):
    component = load("transformer", "transformer.onnx")
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=5)
    expected = transformer(**inputs)
    inputs["tokens"] = inputs["tokens"].double().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(component(**inputs), expected, **TOLERANCE)


def test_an_output_is_not_overwritten_by_the_next_call(load, vae_decoder):
    component = load("vae_decoder", "vae_decoder.onnx")
    first, second = torch.randn(2, 1, 4, 5, 7)
    kept = component(latents=first)
    component(latents=second)
    torch.testing.assert_close(kept, vae_decoder(first), **TOLERANCE)


def test_vae_decoder_at_several_sizes(load, vae_decoder):
    component = load("vae_decoder", "vae_decoder.onnx")
    for shape in ((1, 4, 4, 12), (3, 4, 12, 4), (2, 4, 9, 9)):
        latents = torch.randn(shape)
        torch.testing.assert_close(component(latents=latents), vae_decoder(latents), **TOLERANCE)


def test_parts_of_a_split_encoder_equal_the_whole(load, text_encoders):
    component = load("text_encoder", "text-0.onnx", "text-1.onnx")
    for batch in (1, 3):
        inputs = text_encoder_inputs(T5.vocab_size, batch=batch, num_tokens=TEXT_TOKENS)
        torch.testing.assert_close(component(**inputs), text_encoders[0](**inputs), **TOLERANCE)


@pytest.mark.parametrize("file", ["transformer.onnx", "transformer.onnx.data"])
def test_a_truncated_file_is_one_line(graphs, make_bundle, tmp_path, file, capfd):
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name in ("transformer.onnx", "transformer.onnx.data"):
        data = (graphs / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] if name == file else data)
    bundle, manifest = make_bundle("transformer", ("transformer/transformer.onnx",))
    with pytest.raises(BundleError, match=r"transformer\.onnx is damaged") as caught:
        get_backend("onnxruntime").load(bundle, manifest, "transformer", CPU)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library itself writes nothing


def test_a_refused_shape_is_one_line(load):
    component = load("transformer", "transformer.onnx")
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=5)
    inputs["pos_embed"] = inputs["pos_embed"][:, :3]
    with pytest.raises(BackendError, match=r"refused transformer\.onnx with .*\(2, 3, 72\)") as e:
        component(**inputs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("tensorrt", "missing"),
    [(False, "CUDAExecutionProvider"), (True, "TensorrtExecutionProvider")],
)
def test_a_provider_that_is_not_installed_names_the_package(monkeypatch, tensorrt, missing):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    backend = OnnxRuntimeBackend(tensorrt=tensorrt)
    stream = SimpleNamespace(device=torch.device("cuda:1"), cuda_stream=7)
    with pytest.raises(BackendError, match=f"no {missing} .*pip install onnxruntime-gpu"):
        backend._providers(stream.device, stream)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [missing, "CUDAExecutionProvider"]
    )
    providers = backend._providers(stream.device, stream)
    assert next(iter(providers)) == missing
    assert providers[missing].items() >= {"device_id": "1", "user_compute_stream": "7"}.items()
    assert providers["CUDAExecutionProvider"]["use_tf32"] == "0"


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_cuda_provider_equals_pytorch(graphs, make_bundle, tmp_path, transformer, side_stream):
    """Also back to back, on the default and on another stream, so that a missing wait shows."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name in ("transformer.onnx", "transformer.onnx.data"):
        (folder / name).write_bytes((graphs / name).read_bytes())
    bundle, manifest = make_bundle("transformer", ("transformer/transformer.onnx",))
    device = torch.device("cuda")
    component = get_backend("onnxruntime").load(bundle, manifest, "transformer", device)
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=231)
    on_gpu = {name: tensor.to(device) for name, tensor in inputs.items()}
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            actual = component(**on_gpu)
            on_gpu["tokens"] = actual[..., :16].contiguous()
            expected = transformer(**inputs)
            inputs["tokens"] = expected[..., :16].contiguous()
            # TF32 products keep 10 bits; the chain shrinks no error
            torch.testing.assert_close(actual.cpu(), expected, atol=5e-2, rtol=5e-2)
