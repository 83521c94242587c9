"""Weight-only quantization against the formats' definitions, written out."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import Kernels, ModelConfig, Precision, Quality, Weights
from pixart_rt.errors import BackendError
from pixart_rt.export.onnx_export import transformer_inputs
from pixart_rt.memory.weights import SIZE, module_bytes
from pixart_rt.model.quantize import quantize_weights
from pixart_rt.model.text_encoder import T5Config, T5Encoder, keep_dtype
from pixart_rt.model.transformer import PixArtTransformer

CONFIG = ModelConfig(num_layers=2, num_heads=2, caption_channels=40, max_text_tokens=9,
                     sample_size=32, micro_conditioning=False)  # fmt: skip
T5 = T5Config(vocab_size=50, d_model=48, d_kv=8, d_ff=96, num_heads=4, num_layers=2)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def encoder(dtype: torch.dtype) -> T5Encoder:
    torch.manual_seed(0)
    module = T5Encoder(T5).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(keep_dtype(name, dtype))
    return module


def denoiser(dtype: torch.dtype) -> DenoiserModule:
    torch.manual_seed(0)
    return DenoiserModule(PixArtTransformer(CONFIG)).eval().requires_grad_(False).to(dtype)


def inputs(rows: int = 2, num_tokens: int = 21) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return transformer_inputs(CONFIG, batch=rows, num_tokens=num_tokens)


def stored_bytes(module: nn.Module) -> int:
    """All bytes behind the parameters, those inside a quantized weight too."""
    total = 0
    for parameter in module.parameters():
        names = getattr(parameter, "tensor_data_names", None)
        if names is None:
            total += parameter.nbytes
        else:
            optional = getattr(parameter, "optional_tensor_data_names", [])
            parts = [getattr(parameter, name) for name in (*names, *optional)]
            total += sum(part.nbytes for part in parts if part is not None)
    return total


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.FP8])
@pytest.mark.parametrize("precision", Precision)
def test_the_predicted_bytes_are_those_of_the_module(
    weights: Weights, precision: Precision
) -> None:
    text, model = encoder(DTYPES[precision]), denoiser(DTYPES[precision])
    for module in (text, model):
        quantize_weights(module, weights)
    expected = module_bytes("text_encoder", asdict(T5), precision, weights)
    assert stored_bytes(text) == expected
    assert stored_bytes(model) == module_bytes("transformer", CONFIG.to_dict(), precision, weights)


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.FP8])
def test_a_quantized_weight_is_its_rounded_original(weights: Weights) -> None:
    """Row by row, within one step of the format below the row's largest value."""
    module, original = encoder(torch.float32), encoder(torch.float32)
    quantize_weights(module, weights)
    for name in ("layers.0.q", "layers.1.wo"):
        actual = module.get_submodule(name).weight.dequantize()
        expected = original.get_submodule(name).weight
        largest = expected.abs().amax(1, keepdim=True)
        # int8: half a step of largest/127; fp8: 3 bits after the first, so 1/16 of the value
        step = largest / 127 * 0.51 if weights is Weights.INT8 else expected.abs() / 16 + 1e-4
        assert bool(((actual - expected).abs() <= step).all())
        assert not torch.equal(actual, expected)
    assert type(module.embed.weight) is nn.Parameter


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.FP8])
@pytest.mark.parametrize("kernels", [Kernels.REFERENCE, Kernels.FUSED])
def test_the_model_runs_with_quantized_weights(weights: Weights, kernels: Kernels) -> None:
    """The oracle is the reference model with the dequantized weights written back."""
    module, oracle = denoiser(torch.float32), denoiser(torch.float32)
    quantize_weights(module, weights)
    for name, layer in module.named_modules():
        if hasattr(getattr(layer, "weight", None), "dequantize") and "blocks" in name:
            wide = layer.weight.dequantize()
            oracle.get_submodule(name).weight = nn.Parameter(wide, requires_grad=False)
    module.core.use(kernels, Quality.HIGH, weights)
    given = inputs()
    with torch.no_grad():
        # float32 sums in another order
        torch.testing.assert_close(module(**given), oracle(**given), atol=2e-4, rtol=2e-4)


def test_full_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    module = encoder(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    quantize_weights(module, Weights.FULL)
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    assert SIZE[Precision.BF16] == 2


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BackendError, match=r"pip install 'pixart_rt\[quant\]'"):
        quantize_weights(encoder(torch.float32), Weights.INT8)
