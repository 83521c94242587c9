"""Weight bytes against the real modules' parameters and the engines' files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt.bundle import ComponentEntry
from pixart_rt.checkpoints.bundle_module import DenoiserModule, build_module
from pixart_rt.config import XL_2_1024_MS, Kernels, ModelConfig, Precision, Quality
from pixart_rt.memory.models import find_model
from pixart_rt.memory.weights import engine_bytes, module_bytes
from pixart_rt.model.component_configs import SD_VAE, T5_XXL, T5Config
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import CONTROLNET, ControlNetConfig, ControlVariant
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.quantize import in_a_layer
from pixart_rt.model.text_kv import TextSide
from pixart_rt.model.transformer import PixArtTransformer

from .conftest import Make

ODD = ModelConfig(num_layers=3, num_heads=2, head_dim=20, caption_channels=44, max_text_tokens=7,
                  sample_size=32, micro_conditioning=False, out_channels=4)  # fmt: skip
ODD_T5 = T5Config(vocab_size=101, d_model=48, d_kv=8, d_ff=100, num_heads=5, num_layers=3)


def stored(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("precision", Precision)
def test_components_in_pytorch(make: Make, precision: Precision) -> None:
    """T5's norms stay float32, and in float16 `wo` too."""
    denoiser, t5 = make.transformer(ODD, precision), make.text_encoder(ODD_T5, precision)
    side = TextSide(ODD).to(DTYPES[precision])
    assert module_bytes("transformer", ODD.to_dict(), precision) == stored(denoiser)
    assert module_bytes("text_side", ODD.to_dict(), precision) == stored(side)
    assert module_bytes("text_encoder", asdict(ODD_T5), precision) == stored(t5)


@pytest.mark.parametrize("variant", ControlVariant)
def test_a_controlnet_s_copies(variant: ControlVariant) -> None:
    """Their linears before and after are quantized and copied as a block's are."""
    control = ControlNetConfig(variant=variant, num_copies=2)
    config = replace(ODD, head_dim=72)
    values = {**config.to_dict(), CONTROLNET: control.to_dict()}
    module = build_module("transformer", values)
    assert isinstance(module.core, ControlNetTransformer)
    found = module_bytes("transformer", values, Precision.FP32)
    assert found == stored(module)
    side = TextSide(config, control.num_copies)
    assert module_bytes("text_side", values, Precision.FP32) == stored(side)
    fast = module_bytes("transformer", values, Precision.FP32, quality=Quality.FAST)
    linears = [layer.weight for name, layer in module.named_modules()
               if isinstance(layer, torch.nn.Linear) and in_a_layer(layer, name)]  # fmt: skip
    assert fast - found == sum(weight.numel() + 4 * len(weight) for weight in linears)


@pytest.mark.parametrize("changes", [
    {},
    {"block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8},
    {"use_post_quant_conv": False, "mid_block_add_attention": False, "latent_channels": 3},
])  # fmt: skip
def test_vae_decoders(changes: dict[str, Any]) -> None:
    config = {**SD_VAE, **changes}
    with torch.device("meta"):
        module = build_module("vae_decoder", config)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert module_bytes("vae_decoder", config, Precision.FP16) == 2 * count


def test_the_published_sizes() -> None:
    """T5-XXL's encoder has 4.762 billion parameters, Stable Diffusion's decoder 49.5 million."""
    text = module_bytes("text_encoder", asdict(T5_XXL), Precision.BF16)
    assert text / 2 == pytest.approx(4.762e9, rel=1e-3)
    assert module_bytes("vae_decoder", SD_VAE, Precision.FP32) / 4 == pytest.approx(
        49.5e6, rel=0.01
    )


def test_quality_fast_keeps_fp8_weights_as_well() -> None:
    config = replace(ODD, head_dim=72)
    module = DenoiserModule(PixArtTransformer(config)).to(torch.bfloat16)
    module.core.use(Kernels.FUSED, Quality.FAST)
    found = module_bytes("transformer", config.to_dict(), Precision.BF16, quality=Quality.FAST)
    assert found == stored(module)


def test_engines_take_their_files_with_external_weights_but_not_a_second_variant(
    tmp_path: Path,
) -> None:
    for name, size in (("a.onnx", 10), ("a.onnx.data", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    files = {"a.onnx": "", "a.onnx.data": ""}
    entry = ComponentEntry(backend="onnxruntime", precision="fp32", parts=("a.onnx",), files=files)
    assert engine_bytes(tmp_path, entry) == 110


def test_models_are_found_by_name_and_in_folders(pipeline_folder: Callable[..., Path]) -> None:
    published = find_model("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
    assert published.config == XL_2_1024_MS
    assert published.configs["text_encoder"] == asdict(T5_XXL)
    tiny = find_model("tiny", 256)
    assert tiny.config.caption_channels == tiny.configs["text_encoder"]["d_model"]
    assert tiny.configs["vae_decoder"]["block_out_channels"] == [16, 32, 64, 64]
    assert "text_encoder" not in find_model("xl-random", 512).configs
    for sigma, tokens in ((False, 120), (True, 300)):
        found = find_model(str(pipeline_folder(128, sigma=sigma)), 1024)
        assert found.config.max_text_tokens == tokens
