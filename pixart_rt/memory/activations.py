"""Peak bytes of activations of a component's one call, from its configuration.

Each formula names the moment at which most is held. B rows, N tokens, T text tokens, D width,
s bytes of the precision, w bytes of what is computed wide (4). A tensor that a caller's variable
still names counts, though nothing reads it again: that is what the allocator sees.
"""

from __future__ import annotations

from pixart_rt.config import ModelConfig, Precision, Quality, Weights
from pixart_rt.memory.shapes import VaeShape
from pixart_rt.memory.weights import SIZE, widened_bytes
from pixart_rt.model.text_encoder import T5Config

WIDE = 4  # bytes: float32


def transformer_activations(
    config: ModelConfig,
    precision: Precision,
    *,
    rows: int,
    num_tokens: int,
    constant: int = 0,
    length: int = 0,
    fused: bool = False,
    quality: Quality = Quality.HIGH,
    weights: Weights = Weights.FULL,
) -> int:
    """One step of the transformer core; `rows` is the batch, doubled by guidance.

    constant: the rows among them whose text is one vector. length: L of the absorbed form of the
    others' text, 0 for keys and values (kernels/cross_attention.py).

    With a = B·N·D·s, one activation of the block, the moment is the end of a block, but the first,
    which works on images until it sees text. Held are x and its norm at the block's entry, x and
    its norm after the cross-attention (4a), its output where all rows have keys and values, which
    is then a variable of the block (1a), the MLP's hidden state (4a), and beside these 8 or 9
        fused                 the new x and its norm                                      2a
        fused, fast           the same; norms and hidden state have half the size, and the
                              hidden state a scale for every 128 columns             -1.5a - 2a
        reference, lossless   the new x, normed, and the two tensors that modulate it     4a
        reference, high       the same, in float32                                        a + 3w
    with w = B·N·D·4. Throughout, of float32, the modulation of images and rows, 6 rows of it made
    contiguous and 6 summed with a table: 19·B·D·4; two statistics for each token. Quantized weights
    are widened for their product, one linear at a time, at most 4D·D numbers beside 9a or 10a; and
    the GELU, no longer fused, makes the least 12a or 13a.

    The reference's absorbed form has, of C rows with H heads, two tensors of scores C·N·H·L·4, the
    output C·N·D·4 and, in half precision, widened values C·H·L·D·4 beside 3a.
    """
    s, D = SIZE[precision], config.hidden_size
    one, wide = rows * num_tokens * D * s, rows * num_tokens * D * WIDE
    named = 4 if constant or length else 5
    if fused and quality is Quality.FAST:
        block = (2 * named + 5) * one // 2 + rows * num_tokens * (4 * D // 128) * WIDE
    elif fused:
        block = (named + 6) * one
    elif quality is Quality.LOSSLESS:
        block = (named + 8) * one
    else:
        block = (named + 5) * one + 3 * wide
    product = 0
    if weights is not Weights.FULL:
        block = max(block, (named + 8) * one)
        product = (named + 5) * one + widened_bytes(4 * D, D, s, weights)
    cross = 0
    if length and not fused:
        attended = rows - constant
        scores = attended * num_tokens * config.num_heads * length * WIDE
        values = attended * config.num_heads * length * D * WIDE if s < WIDE else 0
        cross = 3 * one + values + 2 * scores + attended * num_tokens * D * WIDE
    small = 19 * rows * D * WIDE + 2 * rows * num_tokens * WIDE
    return max(block, product, cross) + small


def text_activations(
    t5: T5Config,
    precision: Precision,
    *,
    rows: int,
    num_tokens: int,
    weights: Weights = Weights.FULL,
) -> int:
    """One forward of the T5 encoder.

    With x = B·T·E·4 (the float32 stream), y = B·T·E·s, i = B·T·I·s (query, key or value),
    S = B·H·T·T·4 (scores), g = B·T·F·s (s is 4 in float16, whose `wo` is float32), held are
        always      the position bias S/B and bias with mask S, the embedding y, the stream x
        attention   y, query, key, value 3i, the scores and their softmax 2S, and then either the
                    softmax in half precision S·s/4, or the product's copies 2i beside it
        MLP         a second x, y, what the attention's variables still name (4i, S), and
                    gate, gelu and product 3g
    Quantized weights are widened for their product: E·F numbers beside 2g in the MLP.
    """
    s, E = SIZE[precision], t5.d_model
    inner = t5.num_heads * t5.d_kv
    half = s < WIDE
    tokens = rows * num_tokens
    stream, norm, head = tokens * E * WIDE, tokens * E * s, tokens * inner * s
    scores = rows * t5.num_heads * num_tokens**2 * WIDE
    gate = tokens * t5.d_ff * (WIDE if precision is Precision.FP16 else s)
    always = scores // rows + scores + norm + stream
    narrow = scores * s // WIDE  # the softmax, cast for the product with the values
    copies = 2 * head + (0 if not half else narrow - scores)
    attention = norm + 3 * head + 2 * scores + max(narrow if half else 0, copies)
    mlp = stream + norm + 4 * head + scores
    product = widened_bytes(E, t5.d_ff, s, weights)
    return always + max(attention, mlp + max(3 * gate, 2 * gate + product))


def vae_activations(
    vae: VaeShape,
    precision: Precision,
    *,
    rows: int,
    height: int,
    width: int,
    score_rows: int = 0,
    conv_copies: int = 0,
) -> int:
    """Decoding latents [rows, C, height, width].

    With c(k, r) = B·k·(r·h)·(r·w)·s for k channels at r times the latents' size, held are
        residual block   its input; before each convolution the norm and its SiLU (2 in, 2 out);
                         at its end hidden, shortcut if the channels change, sum and quotient
        upsampling       the small image, the large one, and the convolution's output
        attention        the residual, normed, query, key, value, output and projection: 7, and the
                         scores B·score_rows·h·w·4 where they exist
    and, in all but the first of a resolution, that resolution's input, which the decoder still
    names. At the end the image, 3 channels, in float32 too. The largest wins: for Stable
    Diffusion's VAE the last resolution's first block, 6·c(128, 8).

    score_rows: queries whose attention scores exist at once: none with a fused attention, a chunk,
        or all h·w. conv_copies: copies of its input that a convolution makes; 1 for oneDNN on a CPU
        where the tensors are not channels-last, as the pipeline's are. cuDNN's workspace is not
        known beforehand and not counted.
    """
    s = SIZE[precision]

    def c(channels: int, scale: int) -> int:
        return rows * channels * height * width * scale**2 * s

    def resnet(inputs: int, outputs: int, scale: int) -> int:
        i, o = c(inputs, scale), c(outputs, scale)
        shortcut = 0 if inputs == outputs else o
        first = i + max(2 * i, i + o + conv_copies * i)
        second = i + max(2 * o, 2 * o + conv_copies * o)
        return max(first, second, i + 3 * o + shortcut)

    deep = vae.channels[-1]
    moments = [c(deep, 1) + resnet(deep, deep, 1)]
    if vae.mid_attention:
        scores = rows * score_rows * height * width * WIDE
        moments.append(8 * c(deep, 1) + scores)
    previous, scale = deep, 1
    for index, channels in enumerate(reversed(vae.channels)):
        entry = c(previous, scale)
        moments.append(resnet(previous, channels, scale))
        if vae.resnets > 1:
            moments.append(entry + resnet(channels, channels, scale))
        if index < len(vae.channels) - 1:
            large = c(channels, 2 * scale)
            moments.append(entry + c(channels, scale) + (2 + conv_copies) * large)
            scale *= 2
        previous = channels
    moments.append(3 * c(previous, scale))
    image = rows * 3 * height * width * scale**2
    moments.append((1 + conv_copies) * c(previous, scale) + image * (s + WIDE))
    return max(moments)
