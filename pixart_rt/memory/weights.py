"""Bytes of a component's weights, from its configuration.

A linear of I inputs and O outputs with a bias has I·O + O numbers. In a precision of s bytes it
takes s·(I·O + O). Quantized it takes I·O bytes and for each output a float32 scale and, in int8, a
zero point of 1 byte (torchao's formats); its bias stays. Norms, tables and embeddings are never
quantized.
"""

from __future__ import annotations

from pixart_rt.config import ModelConfig, Precision, Quality, Weights
from pixart_rt.memory.shapes import VaeShape
from pixart_rt.model.text_encoder import T5Config

SIZE = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}  # bytes


def linear_bytes(
    inputs: int, outputs: int, size: int, weights: Weights = Weights.FULL, bias: bool = True
) -> int:
    """Bytes of one linear in a precision of `size` bytes."""
    if weights is Weights.FULL:
        stored = inputs * outputs * size
    else:
        stored = inputs * outputs + outputs * (4 if weights is Weights.FP8 else 5)
    return stored + outputs * size * bias


def widened_bytes(inputs: int, outputs: int, size: int, weights: Weights) -> int:
    """Bytes that a product with a quantized weight takes while it runs, where it is widened.

    int8 is cast to the input's precision. fp8 is cast to float32, multiplied by its scales there,
    and cast to the precision.
    """
    each = {
        Weights.FULL: 0,
        Weights.INT8: size,
        Weights.FP8: 8 + (size if size < 4 else 0),
    }
    return inputs * outputs * each[weights]


def transformer_weights(
    config: ModelConfig,
    precision: Precision,
    weights: Weights = Weights.FULL,
    quality: Quality = Quality.HIGH,
) -> int:
    """Bytes of the transformer core on its device, without what runs outside it: the modulator,
    on the CPU, and the text side.

    Of width D and L blocks:
        block      table 6·D; linears D→3D, D→D (self-attention), D→D, D→D (cross-attention),
                   D→4D, 4D→D (MLP)
        around     patches→D; final table 2·D and D→p·p·out
    `weights` is of the blocks' linears. Quality fast keeps an fp8 copy of them, with float32
    scales, beside the originals.
    """
    s, D = SIZE[precision], config.hidden_size
    shapes = [(D, 3 * D), (D, D), (D, D), (D, D), (D, 4 * D), (4 * D, D)]
    block = 6 * D * s + sum(linear_bytes(i, o, s, weights) for i, o in shapes)
    if quality is Quality.FAST:
        block += sum(i * o + 4 * o for i, o in shapes)
    around = (
        linear_bytes(config.token_channels, D, s)
        + 2 * D * s
        + linear_bytes(D, config.patch_size**2 * config.out_channels, s)
    )
    return config.num_layers * block + around


def text_side_weights(config: ModelConfig, precision: Precision) -> int:
    """Bytes of the text side, never quantized: captions C→D→D, and of each block's cross-attention
    D→D, D→2D, D→D. The first and the last of them are also in the core.
    """
    s, D = SIZE[precision], config.hidden_size
    captions = linear_bytes(config.caption_channels, D, s) + linear_bytes(D, D, s)
    block = 2 * linear_bytes(D, D, s) + linear_bytes(D, 2 * D, s)
    return captions + config.num_layers * block


def text_weights(t5: T5Config, precision: Precision, weights: Weights = Weights.FULL) -> int:
    """Bytes of the text encoder.

    Of width E, inner width I = heads · head width, feed-forward F and L layers, without biases:
        layer      E→I three times, I→E, E→F twice, F→E (in float16 this last one is float32);
                   two norms of E in float32
        around     token embedding V·E, position embedding buckets · heads, a norm of E in float32
    """
    s, E, F = SIZE[precision], t5.d_model, t5.d_ff
    inner = t5.num_heads * t5.d_kv
    wide = 4 if precision is Precision.FP16 else s
    shapes = [(E, inner, s)] * 3 + [(inner, E, s), (E, F, s), (E, F, s), (F, E, wide)]
    layer = sum(linear_bytes(i, o, size, weights, bias=False) for i, o, size in shapes) + 2 * E * 4
    embeddings = t5.vocab_size * E + t5.relative_attention_num_buckets * t5.num_heads
    return t5.num_layers * layer + embeddings * s + E * 4


def vae_weights(vae: VaeShape, precision: Precision) -> int:
    """Bytes of the VAE decoder.

    A 3×3 convolution has 9·in·out + out numbers, a residual block two of them, two norms of twice
    their channels and, where the channels change, a 1×1 convolution. The middle has two blocks and,
    with attention, a norm and four linears. Every resolution but the last ends in a convolution.
    """

    def conv(inputs: int, outputs: int, taps: int = 9) -> int:
        return taps * inputs * outputs + outputs

    def resnet(inputs: int, outputs: int) -> int:
        norms = 2 * inputs + 2 * outputs
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return norms + conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    first, deep, L = vae.channels[0], vae.channels[-1], vae.latent_channels
    count = conv(L, L, 1) * vae.post_quant_conv + conv(L, deep) + 2 * resnet(deep, deep)
    if vae.mid_attention:
        count += 2 * deep + 4 * conv(deep, deep, 1)
    previous = deep
    for index, channels in enumerate(reversed(vae.channels)):
        count += resnet(previous, channels) + (vae.resnets - 1) * resnet(channels, channels)
        last = index == len(vae.channels) - 1
        count += 0 if last else conv(channels, channels)
        previous = channels
    count += 2 * first + conv(first, 3)
    return count * SIZE[precision]
