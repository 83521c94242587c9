"""The matrix products of one request, counted from the model's configuration.

An operation is a multiplication or an addition. Every operand of a product is read once and its
result written once; elementwise passes are taken as fused into a product, so they move nothing.
Tests hold the operations to torch.utils.flop_counter.FlopCounterMode.

Two ways to make the same image are counted. PLAIN does all work in every step, as diffusers does.
EXACT leaves out what can be left out without changing the image:
  - keys, values and the caption projection once per request, T5 at the prompt's own length;
  - the unconditional half, whose text is one token, has a constant cross-attention; its embedding
    comes with the bundle;
  - conditional cross-attention absorbed into two products, where its form has less work;
  - both halves share the patch embedding and the first block's self-attention;
  - the learned variance's rows of the last projection are not computed.

R rows of a batch, N image tokens, T text tokens, D width, H heads, K head width, h×w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pixart_rt.buckets import VAE_SCALE_FACTOR
from pixart_rt.config import ModelConfig
from pixart_rt.kernels.cross_attention import Form, choose_form
from pixart_rt.model.embeddings import FREQUENCY_CHANNELS
from pixart_rt.model.text_encoder import T5Config

KERNEL = 3  # of every convolution in the VAE but the shortcuts


class Work(StrEnum):
    """Which of the two ways is counted."""

    PLAIN = "plain"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, `times` times over."""

    name: str
    flops: int  # of one
    elements: int  # read and written by one
    times: int = 1

    @property
    def total_flops(self) -> int:
        return self.flops * self.times

    @property
    def total_elements(self) -> int:
        return self.elements * self.times


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one call of the pipeline makes."""

    batch: int  # images
    num_tokens: int  # N of the bucket
    prompt_tokens: int  # the longest prompt of the batch, end token included
    height: int  # pixels
    width: int
    steps: int
    guided: bool

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch: guidance doubles it."""
        return 2 * self.batch if self.guided else self.batch


def linear(name: str, rows: int, inner: int, out: int, times: int = 1) -> Product:
    """[rows, inner] times a weight [inner, out]."""
    elements = rows * inner + inner * out + rows * out
    return Product(name, 2 * rows * inner * out, elements, times)


def attention(
    name: str, rows: int, heads: int, queries: int, keys: int, width: int, times: int = 1
) -> Product:
    """q·kᵀ and its product with v, for `heads` heads of `width`."""
    elements = rows * heads * width * 2 * (queries + keys)
    return Product(name, 4 * rows * heads * queries * keys * width, elements, times)


def conv(name: str, rows: int, inner: int, out: int, pixels: int, kernel: int = KERNEL) -> Product:
    """A convolution of stride 1 over `pixels` pixels."""
    weight = inner * out * kernel**2
    return Product(name, 2 * rows * pixels * weight, rows * pixels * (inner + out) + weight)


def text_encoder(config: T5Config, load: Load, max_tokens: int, work: Work) -> list[Product]:
    """T5: the prompts, and in the plain way the empty prompt next to each, padded to the limit."""
    plain = work is Work.PLAIN
    rows, T = (load.rows, max_tokens) if plain else (load.batch, load.prompt_tokens)
    E, inner, L = config.d_model, config.num_heads * config.d_kv, config.num_layers
    return [
        linear("T5 q, k, v", rows * T, E, inner, 3 * L),
        attention("T5 attention", rows, config.num_heads, T, T, config.d_kv, L),
        linear("T5 attention out", rows * T, inner, E, L),
        linear("T5 MLP in", rows * T, E, config.d_ff, 2 * L),
        linear("T5 MLP out", rows * T, config.d_ff, E, L),
    ]


def text_once(config: ModelConfig, load: Load, work: Work) -> list[Product]:
    """What the exact way computes from the text once per request, not in every step."""
    if work is Work.PLAIN:
        return []
    D, L, rows = config.hidden_size, config.num_layers, load.batch * load.prompt_tokens
    products = [
        *_captions(config, rows),
        linear("cross k, v", rows, D, 2 * D, L),
    ]
    if (width := _absorbed_width(config, load)) is not None:
        # Per head, a key [K] times its rows of W_q gives [D]; a value with W_o likewise.
        K = config.head_dim
        elements = load.batch * width * (K + D) + D * D
        products.append(Product("absorb", 2 * load.batch * width * K * D, elements, 2 * L))
    return products


def step(config: ModelConfig, load: Load, work: Work) -> list[Product]:
    """One denoising step: the transformer once, both halves of guidance in its batch."""
    D, L, N = config.hidden_size, config.num_layers, load.num_tokens
    exact = work is Work.EXACT
    rows = load.rows
    first = load.batch if exact else rows  # rows of the first block's self-attention
    out = config.in_channels if exact else config.out_channels
    products = [linear("patches", first * N, config.token_channels, D)]
    if not exact:
        products += modulator(config, rows)
        products += _captions(config, rows * config.max_text_tokens)
        products.append(linear("cross k, v", rows * config.max_text_tokens, D, 2 * D, L))
    for count, times in ((first, 1), (rows, L - 1)):
        products += [
            linear("q, k, v", count * N, D, 3 * D, times),
            attention("self-attention", count, config.num_heads, N, N, config.head_dim, times),
            linear("attention out", count * N, D, D, times),
        ]
    return [
        *products,
        *(_cross_exact(config, load) if exact else _cross_plain(config, load, rows)),
        linear("MLP in", rows * N, D, 4 * D, L),
        linear("MLP out", rows * N, 4 * D, D, L),
        linear("last projection", rows * N, D, config.patch_size**2 * out),
    ]


def modulator(config: ModelConfig, rows: int) -> list[Product]:
    """Timestep and, with micro-conditioning, size to modulation; ours runs it once per plan."""
    D, F = config.hidden_size, FREQUENCY_CHANNELS
    products = [linear("timestep", rows, F, D), linear("timestep", rows, D, D)]
    if config.micro_conditioning:
        third = D // 3
        for name, count in (("size", 2 * rows), ("aspect ratio", rows)):
            products += [linear(name, count, F, third), linear(name, count, third, third)]
    return [*products, linear("modulation", rows, D, 6 * D)]


def vae_decoder(config: dict[str, Any], load: Load) -> list[Product]:
    """diffusers' AutoencoderKL decoder of this configuration."""
    B, widths = load.batch, [int(width) for width in reversed(config["block_out_channels"])]
    pixels = load.height * load.width // VAE_SCALE_FACTOR**2
    latent = int(config["latent_channels"])
    products = [conv("conv in", B, latent, widths[0], pixels)]
    if config.get("use_post_quant_conv", True):
        products.append(conv("post quant", B, latent, latent, pixels, 1))
    products += [*_resnet("middle", B, widths[0], widths[0], pixels)] * 2
    if config.get("mid_block_add_attention", True):
        products += [
            linear("middle q, k, v, out", B * pixels, widths[0], widths[0], 4),
            attention("middle attention", B, 1, pixels, pixels, widths[0]),
        ]
    inner = widths[0]
    for level, width in enumerate(widths):
        for _ in range(int(config["layers_per_block"]) + 1):
            products += _resnet(f"level {level}", B, inner, width, pixels)
            inner = width
        if level + 1 < len(widths):
            pixels *= 4
            products.append(conv(f"level {level} up", B, width, width, pixels))
    return [*products, conv("conv out", B, widths[-1], int(config.get("out_channels", 3)), pixels)]


def _captions(config: ModelConfig, rows: int) -> list[Product]:
    D = config.hidden_size
    return [
        linear("caption projection", rows, config.caption_channels, D),
        linear("caption projection", rows, D, D),
    ]


def _cross_plain(config: ModelConfig, load: Load, rows: int) -> list[Product]:
    D, L, N = config.hidden_size, config.num_layers, load.num_tokens
    heads, T = config.num_heads, config.max_text_tokens
    return [
        linear("cross q", rows * N, D, D, L),
        attention("cross-attention", rows, heads, N, T, config.head_dim, L),
        linear("cross out", rows * N, D, D, L),
    ]


def _cross_exact(config: ModelConfig, load: Load) -> list[Product]:
    """Of the conditional half alone: the unconditional one adds a constant."""
    D, L, N, B = config.hidden_size, config.num_layers, load.num_tokens, load.batch
    if choose_form(load.prompt_tokens) is Form.CONSTANT:
        return []
    width = _absorbed_width(config, load)
    if width is None:
        return [
            linear("cross q", B * N, D, D, L),
            attention("cross-attention", B, config.num_heads, N, load.prompt_tokens,
                      config.head_dim, L),
            linear("cross out", B * N, D, D, L),
        ]  # fmt: skip
    elements = B * (N * D + D * width + N * width)  # keys and values are each image's own
    return [Product("absorbed cross-attention", 2 * B * N * D * width, elements, 2 * L)]


def _absorbed_width(config: ModelConfig, load: Load) -> int | None:
    """Heads times padded tokens of the absorbed form, or None where the standard form is chosen."""
    form = choose_form(load.prompt_tokens)
    if form in (Form.STANDARD, Form.CONSTANT):
        return None
    return config.num_heads * int(form.value)


def _resnet(name: str, rows: int, inner: int, out: int, pixels: int) -> Iterator[Product]:
    yield conv(name, rows, inner, out, pixels)
    yield conv(name, rows, out, out, pixels)
    if inner != out:
        yield conv(f"{name} shortcut", rows, inner, out, pixels, 1)
