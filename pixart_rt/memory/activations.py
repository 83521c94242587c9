"""Peak bytes of one call of a component beyond its weights and inputs.

A build measures them at two sizes and keeps them in the manifest; they are linear in the size:

    text encoder    prompts, of the model's full length (the scores are quadratic in that)
    transformer     rows · tokens; guidance doubles the rows
    VAE decoder     images · latent pixels

Where nothing was measured (a model that is not built, a bundle of format 3) there is an upper bound
for each. s bytes of the precision; what is widened for a product with quantized weights is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixart_rt.config import Precision, Weights
from pixart_rt.memory.weights import SIZE, transformer_configs
from pixart_rt.model.component_configs import T5Config


def interpolate(peaks: Sequence[Sequence[int]], size: int) -> int:
    """Bytes at `size` on the line through the two nearest of the measured [size, bytes].

    A single point is an engine's own figure, for every size.
    """
    if len(peaks) == 1:
        return peaks[0][1]
    above = next((i for i, (known, _) in enumerate(peaks) if known >= size), len(peaks) - 1)
    (low, fewer), (high, more) = peaks[max(above, 1) - 1], peaks[max(above, 1)]
    return max(0, round(fewer + (size - low) * (more - fewer) / (high - low)))


def upper_bound(
    component: str,
    config: dict[str, Any],
    size: int,
    num_text: int,
    precision: Precision,
    weights: Weights = Weights.FULL,
) -> int:
    """The most that a component in PyTorch takes at `size`; `num_text` is the prompts' length.

    transformer     at the end of a block: stream, norms and cross-attention 6·D·s, the MLP's hidden
                    state 4·D·s, and for the reference operators 3·D of float32, which fused kernels
                    do not need; a ControlNet's copies leave the stream, their input and additions
    text encoder    the scores five times (position bias, mask, product, softmax and its copy),
                    stream and norms 3·E in float32, query, key, value and output 4·I·s, the MLP 3·F
    VAE decoder     in the first block at full resolution, of C channels: its input of P channels,
                    normed and activated, or the input with four tensors of C
    """
    s = SIZE[precision]
    if component == "vae_decoder":
        channels = config.get("block_out_channels", (64,))
        first, before = channels[0], channels[min(1, len(channels) - 1)]
        most = max(3 * before, before + 4 * first)
        return size * 4 ** (len(channels) - 1) * most * s
    if component == "transformer":
        model, control = transformer_configs(config)
        D, streams = model.hidden_size, 10 if control is None else 14
        return size * D * (streams * s + 12) + _widened(4 * D * D, s, weights)
    t5 = T5Config(**config)
    wide = 4 if precision is Precision.FP16 else s  # the MLP's last linear stays float32
    token = 3 * t5.d_model * 4 + 4 * t5.num_heads * t5.d_kv * s + 3 * t5.d_ff * wide
    calls = size * num_text * (5 * t5.num_heads * num_text * 4 + token)
    return calls + _widened(t5.d_model * t5.d_ff, s, weights)


def vae_encoder_bound(config: dict[str, Any], pixels: int) -> int:
    """The most that encoding a control image takes, in float32: at full size, the image and five
    tensors of the first block.
    """
    return pixels * (3 + 5 * int(config.get("block_out_channels", (64,))[0])) * 4


def _widened(numbers: int, s: int, weights: Weights) -> int:
    """The largest weight while its product runs: int8 in the precision, fp8 also in float32."""
    each = {Weights.FULL: 0, Weights.INT8: s, Weights.FP8: 8 + (s if s < 4 else 0)}
    return numbers * each[weights]
