"""Peak bytes of one call of a component beyond its weights and inputs.

A build measures them at a few sizes and keeps them in the manifest; they are linear in the size,

    text encoder    prompts, of the model's full length (the scores are quadratic in that)
    transformer     rows · tokens; guidance doubles the rows
    VAE decoder     images · latent pixels

Where nothing was measured (a model that is not built) there is an upper bound for each.
s bytes of the precision; what is widened for a product with quantized weights comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixart_rt.config import ModelConfig, Precision, Weights
from pixart_rt.memory.weights import SIZE
from pixart_rt.model.text_encoder import T5Config


def interpolate(peaks: Sequence[Sequence[int]], size: int) -> int:
    """Bytes at `size` on the line through the two nearest of the measured [size, bytes].

    A single point is an engine's own figure, whatever the size.
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
    """The most that a component in PyTorch takes at `size`; `num_text` is the prompts' length."""
    if component == "text_encoder":
        return _text_encoder(T5Config(**config), size, num_text, precision, weights)
    if component == "transformer":
        return _transformer(ModelConfig.from_dict(config), size, precision, weights)
    return _vae_decoder(config.get("block_out_channels", (64,)), size, SIZE[precision])


def _transformer(config: ModelConfig, tokens: int, precision: Precision, weights: Weights) -> int:
    """At the end of a block: stream, norms and cross-attention 6·D·s, the MLP's hidden state 4·D·s,
    and for the reference operators 3·D of float32; fused kernels need none of the latter.
    """
    s, D = SIZE[precision], config.hidden_size
    return tokens * D * (10 * s + 12) + _widened(4 * D * D, s, weights)


def _text_encoder(
    t5: T5Config, rows: int, num_text: int, precision: Precision, weights: Weights
) -> int:
    """The scores five times (position bias, mask, product, softmax and its copy), the stream and
    norms 3·E in float32, query, key, value and output 4·I·s, the gated MLP 3·F.
    """
    s, inner = SIZE[precision], t5.num_heads * t5.d_kv
    wide = 4 if precision is Precision.FP16 else s  # T5's last linear stays float32
    scores = 5 * rows * t5.num_heads * num_text**2 * 4
    token = 3 * t5.d_model * 4 + 4 * inner * s + 3 * t5.d_ff * wide
    return scores + rows * num_text * token + _widened(t5.d_model * t5.d_ff, s, weights)


def _vae_decoder(channels: Sequence[int], size: int, s: int) -> int:
    """In the first block at full resolution: its input of P channels, normed and activated, or the
    input with three tensors of C channels and the shortcut. A latent pixel is 4^(resolutions-1).
    """
    first, before = channels[0], channels[min(1, len(channels) - 1)]
    most = max(3 * before, before + (3 + (before != first)) * first)
    return size * 4 ** (len(channels) - 1) * most * s


def _widened(numbers: int, s: int, weights: Weights) -> int:
    """The largest weight while its product runs: int8 in the precision, fp8 also in float32."""
    each = {Weights.FULL: 0, Weights.INT8: s, Weights.FP8: 8 + (s if s < 4 else 0)}
    return numbers * each[weights]
