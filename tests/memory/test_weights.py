"""Predicted weight bytes against the parameters of the real modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import (
    SIGMA_XL_2_1024,
    XL_2_256,
    XL_2_1024_MS,
    Kernels,
    ModelConfig,
    Precision,
    Quality,
)
from pixart_rt.memory.shapes import SD_VAE_SHAPE, VaeShape, find_shape
from pixart_rt.memory.weights import (
    text_side_weights,
    text_weights,
    transformer_weights,
    vae_weights,
)
from pixart_rt.model.text_encoder import T5_XXL, T5Config, T5Encoder, keep_dtype
from pixart_rt.model.text_kv import TextSide
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, vae_from_config

from .conftest import DTYPES, vae_values

ODD = ModelConfig(num_layers=3, num_heads=2, head_dim=20, caption_channels=44, max_text_tokens=7,
                  sample_size=32, micro_conditioning=False, out_channels=4)  # fmt: skip
ODD_T5 = T5Config(vocab_size=101, d_model=48, d_kv=8, d_ff=100, num_heads=5, num_layers=3)


def module_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() * dtype.itemsize for parameter in module.parameters())


@pytest.mark.parametrize("config", [XL_2_1024_MS, XL_2_256, SIGMA_XL_2_1024, ODD])
@pytest.mark.parametrize("precision", Precision)
def test_the_transformer_s_weights(config: ModelConfig, precision: Precision) -> None:
    with torch.device("meta"):
        module = DenoiserModule(PixArtTransformer(config))
    expected = module_bytes(module, DTYPES[precision])
    assert transformer_weights(config, precision) == expected
    with torch.device("meta"):
        side = TextSide(config)
    assert text_side_weights(config, precision) == module_bytes(side, DTYPES[precision])


@pytest.mark.parametrize("t5", [T5_XXL, ODD_T5, replace(ODD_T5, num_layers=1)])
@pytest.mark.parametrize("precision", Precision)
def test_the_text_encoder_s_weights(t5: T5Config, precision: Precision) -> None:
    """Norms stay float32, and in float16 `wo` too."""
    with torch.device("meta"):
        module = T5Encoder(t5)
    expected = sum(
        parameter.numel() * keep_dtype(name, DTYPES[precision]).itemsize
        for name, parameter in module.named_parameters()
    )
    assert text_weights(t5, precision) == expected


def test_t5_xxl_has_4_76_billion_parameters() -> None:
    assert text_weights(T5_XXL, Precision.BF16) / 2 == pytest.approx(4.762e9, rel=1e-3)


@pytest.mark.parametrize(
    "vae",
    [
        SD_VAE_SHAPE,
        VaeShape(channels=(32,), resnets=2),
        VaeShape(channels=(32, 32, 64), resnets=2, mid_attention=False, post_quant_conv=False),
    ],
)
def test_the_vae_s_weights(vae: VaeShape) -> None:
    values = vae_values(vae, 32)
    with torch.device("meta"):
        module = VaeDecoder(vae_from_config(values))
    assert vae_weights(vae, Precision.FP32) == module_bytes(module, torch.float32)
    assert VaeShape.from_dict(values) == vae


def test_shapes_are_found_by_name_and_in_folders() -> None:
    published = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
    assert (published.config, published.text, published.vae) == (
        XL_2_1024_MS,
        T5_XXL,
        SD_VAE_SHAPE,
    )
    tiny = find_shape("tiny", 256)
    assert tiny.text is not None
    assert tiny.config.caption_channels == tiny.text.d_model
    assert tiny.vae.channels == (16, 32, 64, 64)


def test_quality_fast_keeps_fp8_weights_beside_the_others() -> None:
    config = replace(ODD, head_dim=72)
    module = DenoiserModule(PixArtTransformer(config)).to(torch.bfloat16)
    module.core.use(Kernels.FUSED, Quality.FAST)
    expected = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert transformer_weights(config, Precision.BF16, quality=Quality.FAST) == expected


def test_a_folder_and_the_family_s_prompt_length_are_read(
    pipeline_folder: Callable[..., Path],
) -> None:
    for sigma, tokens in ((False, 120), (True, 300)):
        shape = find_shape(str(pipeline_folder(128, sigma=sigma)), 1024)
        assert shape.config.max_text_tokens == tokens
        assert shape.text is not None
        assert (shape.text.d_model, shape.vae.channels) == (32, (8, 8, 16, 16))
        assert not shape.vae.mid_attention
