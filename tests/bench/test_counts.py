"""The counted operations against PyTorch's own counter, on models without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pixart_rt.bench import counts
from pixart_rt.bench.counts import Load, Product, Work
from pixart_rt.config import XL_2_1024_MS, ModelConfig
from pixart_rt.kernels.cross_attention import (
    absorb,
    choose_form,
    cross_attention_absorbed_ref,
)
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.transformer import Modulator, PixArtTransformer
from pixart_rt.model.vae import SD_VAE, VaeDecoder

SMALL = ModelConfig(num_layers=3, num_heads=2, caption_channels=40, max_text_tokens=21)
T5 = T5Config(vocab_size=50, d_model=40, d_kv=6, d_ff=56, num_heads=3, num_layers=2)
TINY_VAE: dict[str, Any] = {
    **SD_VAE,
    "block_out_channels": [4, 8, 8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "use_post_quant_conv": False,
}
LOAD = Load(
    batch=3, num_tokens=35, prompt_tokens=7, height=80, width=112, steps=4, guided=True
)  # 5 × 7 tokens of 16 pixels


def total(products: list[Product]) -> int:
    return sum(product.total_flops for product in products)


def counted(function: Callable[[], Any]) -> int:
    """What PyTorch counts. Attention is taken apart: its CPU operator has no formula there."""
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        function()
    return counter.get_total_flops()


def empty(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make().eval()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("micro", [True, False])
def test_a_plain_step(guided: bool, micro: bool) -> None:
    config = replace(SMALL, micro_conditioning=micro)
    load = replace(LOAD, guided=guided)
    model, rows = on_meta(lambda: PixArtTransformer(config)), load.rows
    timestep, size, aspect = empty(rows), empty(rows, 2), empty(rows)

    def run() -> None:
        modulation = model.modulator(timestep, size, aspect)
        model(
            empty(rows, load.num_tokens, config.token_channels),
            empty(1, load.num_tokens, config.hidden_size),
            modulation,
            empty(rows, config.max_text_tokens, config.caption_channels),
            torch.ones(rows, config.max_text_tokens, dtype=torch.bool, device="meta"),
        )

    assert total(counts.step(config, load, Work.PLAIN)) == counted(run)


def test_the_modulator_alone() -> None:
    model = on_meta(lambda: Modulator(SMALL))
    assert total(counts.modulator(SMALL, 5)) == counted(
        lambda: model(empty(5), empty(5, 2), empty(5))
    )


@pytest.mark.parametrize("work", list(Work))
def test_the_text_encoder(work: Work) -> None:
    encoder = on_meta(lambda: T5Encoder(T5))
    rows, tokens = (2 * 3, 21) if work is Work.PLAIN else (3, 7)
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    encoder.fold_position_bias(tokens)
    expected = counted(lambda: encoder(ids, torch.ones_like(ids)))
    assert total(counts.text_encoder(T5, LOAD, 21, work)) == expected


@pytest.mark.parametrize("config", [TINY_VAE, SD_VAE], ids=["tiny", "sd"])
def test_the_vae_decoder(config: dict[str, Any]) -> None:
    decoder = on_meta(lambda: VaeDecoder(AutoencoderKL.from_config(config)))
    expected = counted(lambda: decoder(empty(3, 4, 10, 14)))
    assert total(counts.vae_decoder(config, LOAD)) == expected


@pytest.mark.parametrize("prompt_tokens", [7, 30, 64])
def test_absorbed_cross_attention(prompt_tokens: int) -> None:
    """Its two products in every step, and making keys and values once, for one block."""
    config = replace(SMALL, num_layers=1)
    load = replace(LOAD, prompt_tokens=prompt_tokens)
    B, D, K, H = load.batch, config.hidden_size, config.head_dim, config.num_heads
    length = int(choose_form(prompt_tokens).value)
    kv, mask = torch.randn(B, prompt_tokens, 2, H, K), torch.ones(B, prompt_tokens).bool()
    weights = torch.randn(D, D), torch.randn(D), torch.randn(D, D), torch.randn(D)
    made = absorb(kv, mask, *weights, length)
    per_step = counted(
        lambda: cross_attention_absorbed_ref(
            torch.randn(B, load.num_tokens, D), made.keys, made.bias, made.values
        )
    )
    (product,) = counts._cross_exact(config, load)
    assert product.total_flops == per_step
    once = {each.name: each for each in counts.text_once(config, load, Work.EXACT)}
    absorbing = counted(lambda: absorb(kv, mask, *weights, length))
    bias = 2 * B * length * H * K  # k·bq: a vector, not counted as a product here
    assert once["absorb"].total_flops == absorbing - bias


@pytest.mark.parametrize("prompt_tokens", [1, 7, 20])
def test_the_exact_way_is_the_plain_one_without_what_it_saves(prompt_tokens: int) -> None:
    load = replace(LOAD, prompt_tokens=prompt_tokens)
    plain = total(counts.step(SMALL, load, Work.PLAIN))
    exact = total(counts.step(SMALL, load, Work.EXACT))
    D, N, B = SMALL.hidden_size, load.num_tokens, load.batch
    saved = {
        "text": total(counts._captions(SMALL, 2 * B * 21)) + 3 * 2 * (2 * B * 21) * D * 2 * D,
        "modulation": total(counts.modulator(SMALL, 2 * B)),
        "first block and patches": B * N * 2 * (4 * D * D + 2 * N * D + 16 * D),
        "variance": 2 * B * N * 2 * D * 16,
        "cross": 3 * 2 * B * N * 2 * (2 * D * D + 2 * 21 * D),
    }
    own = total(counts._cross_exact(SMALL, load))
    assert exact == plain - sum(saved.values()) + own
    assert own == 0 if prompt_tokens == 1 else own > 0


def test_the_published_model_at_1024_pixels() -> None:
    """13.02 TFLOP a step with guidance: the figure of PixArt-alpha's shapes, counted elsewhere."""
    load = Load(batch=1, num_tokens=4096, prompt_tokens=30, height=1024, width=1024, steps=20,
                guided=True)  # fmt: skip
    assert total(counts.step(XL_2_1024_MS, load, Work.PLAIN)) == pytest.approx(13.02e12, rel=1e-3)
    assert total(counts.vae_decoder(SD_VAE, load)) == pytest.approx(10.47e12, rel=1e-3)


def test_a_product_moves_each_operand_once() -> None:
    assert counts.linear("x", 5, 7, 11, 3).total_elements == 3 * (5 * 7 + 7 * 11 + 5 * 11)
    assert counts.attention("x", 2, 3, 5, 7, 4).elements == 2 * 3 * 4 * (5 + 5 + 7 + 7)
    assert counts.conv("x", 2, 3, 4, 30).elements == 2 * 30 * 3 + 3 * 4 * 9 + 2 * 30 * 4
