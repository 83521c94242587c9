"""Predicted activations against the CPU allocator's peak, of real modules.

Ten per cent is what the plan promises (docs/memory.md). Shapes go from those where weights dominate
(few tokens) to those where activations do.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_rt.config import XL_2_1024_MS, Kernels, ModelConfig, Precision, Quality, Weights
from pixart_rt.memory.activations import (
    text_activations,
    transformer_activations,
    vae_activations,
)
from pixart_rt.memory.measure import LiveTensors, peak_bytes
from pixart_rt.memory.shapes import VaeShape, find_shape
from pixart_rt.memory.text_side import (
    absorb_activations,
    absorbed_bytes,
    absorbed_length,
    kv_bytes,
    text_side_activations,
)
from pixart_rt.model.quantize import quantize_weights
from pixart_rt.model.text_encoder import T5Config
from pixart_rt.model.text_kv import PromptText, TextSide

from .conftest import DTYPES, Make

TOLERANCE = 0.10


def small(heads: int, layers: int = 2, text: int = 20, caption: int = 64) -> ModelConfig:
    return ModelConfig(num_layers=layers, num_heads=heads, max_text_tokens=text, sample_size=32,
                       caption_channels=caption, micro_conditioning=False)  # fmt: skip


TRANSFORMERS = [  # config, rows, tokens, rows of one vector, slots of the absorbed form
    (small(2), 2, 256, 0, 0),
    (small(2), 2, 256, 1, 16),
    (small(2, layers=5, text=120), 1, 231, 0, 0),
    (small(2, layers=5, text=120), 4, 77, 2, 64),
    (small(8, text=120), 2, 1024, 0, 0),  # activations dominate: 75 MB beside 13 MB of weights
    (small(8, text=120), 2, 1024, 1, 0),
    (small(8, text=120), 2, 1024, 1, 32),
    (small(16), 1, 64, 0, 0),  # weights dominate: 85 MB beside 5 MB
    (small(16, text=120), 1, 64, 0, 64),  # widened values are the peak
]


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    ("config", "rows", "num_tokens", "constant", "length", "quality"),
    [(*case, Quality.HIGH) for case in TRANSFORMERS]
    + [(*case, Quality.LOSSLESS) for case in TRANSFORMERS if not case[-1]],  # it never absorbs
)
def test_transformer(
    make: Make,
    config: ModelConfig,
    rows: int,
    num_tokens: int,
    constant: int,
    length: int,
    precision: Precision,
    quality: Quality,
) -> None:
    module = make.transformer(config, precision)
    module.core.use(Kernels.REFERENCE, quality)
    inputs = make.transformer_inputs(
        config, rows, num_tokens, precision=precision, constant=constant, length=length
    )
    with torch.no_grad():
        measured = peak_bytes(lambda: module(**inputs))
    predicted = transformer_activations(
        config, precision, rows=rows, num_tokens=num_tokens, constant=constant, length=length,
        quality=quality,
    )  # fmt: skip
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.FP8])
@pytest.mark.parametrize(
    ("heads", "rows", "num_tokens", "constant", "length"),
    [(4, 2, 256, 0, 0), (4, 2, 256, 1, 16), (8, 1, 32, 0, 0), (8, 2, 32, 1, 0)],
)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_transformer_with_quantized_weights(
    make: Make,
    weights: Weights,
    heads: int,
    rows: int,
    num_tokens: int,
    constant: int,
    length: int,
    precision: Precision,
) -> None:
    """With few tokens the widened weight is the peak."""
    config = small(heads)
    module = make.transformer(config, precision)
    quantize_weights(module, weights)
    inputs = make.transformer_inputs(
        config, rows, num_tokens, precision=precision, constant=constant, length=length
    )
    with torch.no_grad():
        module(**inputs)  # torchao's first call makes tables
        measured = peak_bytes(lambda: module(**inputs))
    predicted = transformer_activations(
        config, precision, rows=rows, num_tokens=num_tokens, constant=constant, length=length,
        weights=weights,
    )  # fmt: skip
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("quality", Quality)
@pytest.mark.parametrize(("constant", "length"), [(0, 0), (1, 0), (1, 64), (0, 16)])
@pytest.mark.parametrize(  # three layers: the first has fewer rows, the last makes no norm
    ("config", "num_tokens"), [(small(8, layers=3), 1024), (XL_2_1024_MS, 4096)]
)
def test_fused_transformer_without_a_gpu(
    make: Make,
    quality: Quality,
    config: ModelConfig,
    num_tokens: int,
    constant: int,
    length: int,
) -> None:
    """The fused operators allocate only what they return, so their outputs' lives are the peak.

    Tensors without memory (FakeTensorMode) tell those, at XL/2's size too. One allocates more: the
    absorbed form's probabilities are no output, and are smaller than the MLP's hidden state.
    """
    with FakeTensorMode():
        module = make.transformer(config, Precision.BF16)
        module.core.use(Kernels.FUSED, quality)
        inputs = make.transformer_inputs(
            config, 2, num_tokens, precision=Precision.BF16, constant=constant, length=length
        )
        live = LiveTensors()
        live.ignore([list(module.parameters()), list(module.buffers()), inputs])
        with torch.no_grad(), live:
            module(**inputs)
    predicted = transformer_activations(
        config, Precision.BF16, rows=2, num_tokens=num_tokens, constant=constant, length=length,
        fused=True, quality=quality,
    )  # fmt: skip
    assert predicted == pytest.approx(live.peak, rel=TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 10, 40, 90])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("config", [small(2, 8, 120), small(4, 2, 120), small(8, 4, 99, 300)])
def test_text_side(
    make: Make, config: ModelConfig, precision: Precision, rows: int, num_tokens: int
) -> None:
    """Keys and values of one prompt, the absorbed form of several, and what of them is kept."""
    side = TextSide(config).to(DTYPES[precision]).eval().requires_grad_(False)
    embeds = torch.randn(1, config.max_text_tokens, config.caption_channels)
    mask = torch.arange(config.max_text_tokens)[None] < num_tokens
    with torch.no_grad():
        measured = peak_bytes(lambda: side(embeds, mask, num_tokens))
        text = side(embeds, mask, num_tokens)
        assert text_side_activations(config, precision) == pytest.approx(measured, rel=TOLERANCE)
        assert text.kv.nbytes == kv_bytes(config, precision)
        joined = PromptText.cat([text] * rows)
        measured = peak_bytes(lambda: side.absorbed(joined))
        absorbed = side.absorbed(joined)
    length = absorbed_length(num_tokens)
    held = 0 if absorbed is None else sum(tensor.nbytes for tensor in absorbed)
    assert held == absorbed_bytes(config, precision, rows, length)
    predicted = absorb_activations(config, precision, rows, length)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


TEXTS = [  # config, rows, tokens
    (T5Config(vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=4), 2, 120),
    (T5Config(vocab_size=300, d_model=256, d_kv=64, d_ff=640, num_heads=4, num_layers=2), 1, 120),
    (T5Config(vocab_size=100, d_model=128, d_kv=16, d_ff=2048, num_heads=2, num_layers=2), 4, 64),
    (T5Config(vocab_size=100, d_model=32, d_kv=64, d_ff=64, num_heads=8, num_layers=2), 2, 120),
    (T5Config(vocab_size=500, d_model=512, d_kv=64, d_ff=1280, num_heads=8, num_layers=3), 2, 40),
]


@pytest.mark.parametrize(("t5", "rows", "num_tokens"), TEXTS)
@pytest.mark.parametrize("precision", Precision)
def test_text_encoder(
    make: Make, t5: T5Config, rows: int, num_tokens: int, precision: Precision
) -> None:
    """Of XL's proportions, and some where attention or the MLP is the peak."""
    module = make.text_encoder(t5, precision)
    inputs = make.text_inputs(t5, rows, num_tokens)
    with torch.no_grad():
        measured = peak_bytes(lambda: module(**inputs))
    predicted = text_activations(t5, precision, rows=rows, num_tokens=num_tokens)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.FP8])
@pytest.mark.parametrize(("t5", "rows", "num_tokens"), [TEXTS[1], TEXTS[4]])
def test_text_encoder_with_quantized_weights(
    make: Make, weights: Weights, t5: T5Config, rows: int, num_tokens: int
) -> None:
    module = make.text_encoder(t5, Precision.BF16)
    quantize_weights(module, weights)
    inputs = make.text_inputs(t5, rows, num_tokens)
    with torch.no_grad():
        module(**inputs)
        measured = peak_bytes(lambda: module(**inputs))
    predicted = text_activations(
        t5, Precision.BF16, rows=rows, num_tokens=num_tokens, weights=weights
    )
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


VAES = [  # shape, rows, latent height and width
    (VaeShape(channels=(16, 32, 64, 64), resnets=2, mid_attention=False), 1, 32, 32),
    (VaeShape(channels=(16, 32, 64, 64), resnets=3), 2, 16, 24),
    (VaeShape(channels=(32, 64, 128, 128), resnets=3), 1, 32, 32),
    (VaeShape(channels=(32, 64, 64), resnets=2), 1, 48, 32),
]


@pytest.mark.parametrize(
    ("vae", "rows", "height", "width", "conv_copies"),
    [(*case, copies) for case, copies in zip(VAES, (1, 0, 1, 1), strict=True)],
)
def test_vae_decoder(
    make: Make, vae: VaeShape, rows: int, height: int, width: int, conv_copies: int
) -> None:
    """In float32, whose convolutions in oneDNN copy their input, unless it is channels-last: that
    it is for two images after the attention, which transposes them.
    """
    module = make.vae(vae, Precision.FP32)
    latents = torch.randn(rows, 4, height, width)
    with torch.no_grad():
        measured = peak_bytes(lambda: module(latents=latents))
    predicted = vae_activations(
        vae, Precision.FP32, rows=rows, height=height, width=width,
        conv_copies=conv_copies,
    )  # fmt: skip
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("vae", "rows", "height", "width"), VAES)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_vae_decoder_s_own_tensors(
    make: Make, vae: VaeShape, rows: int, height: int, width: int, precision: Precision
) -> None:
    """Without the convolution library's scratch memory."""
    module = make.vae(vae, precision)
    latents = torch.randn(rows, 4, height, width)
    live = LiveTensors()
    live.ignore([list(module.parameters()), latents])
    with torch.no_grad(), live:
        module(latents=latents)
    predicted = vae_activations(vae, precision, rows=rows, height=height, width=width)
    assert predicted == pytest.approx(live.peak, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_components_on_the_gpu(make: Make, precision: Precision) -> None:
    """XL/2's own shapes with random weights: transformer at 1024 px, VAE at 512, a T5 of 4 layers.

    cuDNN's workspace is in the measured figure of the VAE.
    """
    shape = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
    device = torch.device("cuda")
    model = make.transformer(shape.config, precision).to(device)
    model.core.use(Kernels.FUSED)
    given = make.transformer_inputs(
        shape.config, 2, 4096, precision=precision, constant=1, length=64
    )
    given = {name: tensor.to(device) for name, tensor in given.items()}
    vae, latents = make.vae(shape.vae, precision).to(device), torch.randn(1, 4, 64, 64).to(device)
    assert shape.text is not None
    t5 = T5Config(vocab_size=1000, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=4)
    text = make.text_encoder(t5, precision).to(device)
    words = {name: each.to(device) for name, each in make.text_inputs(t5, 2, 120).items()}
    calls = {
        "transformer": (
            lambda: model(**given),
            transformer_activations(
                shape.config, precision, rows=2, num_tokens=4096, constant=1, length=64, fused=True
            ),
        ),
        "vae_decoder": (
            lambda: vae(latents=latents),
            vae_activations(shape.vae, precision, rows=1, height=64, width=64),
        ),
        "text_encoder": (
            lambda: text(**words),
            text_activations(t5, precision, rows=2, num_tokens=120),
        ),
    }
    for name, (call, predicted) in calls.items():
        with torch.no_grad():
            call()  # cuBLAS's workspace is allocated once
            measured = peak_bytes(call, device)
        assert predicted == pytest.approx(measured, rel=TOLERANCE), name
