"""Bytes of a component's weights, from its configuration alone; an engine takes its files.

A linear of I inputs and O outputs has I·O + O numbers of s bytes. Quantized it takes I·O bytes and
for each output a float32 scale and, in int8, a zero point of 1 byte (torchao's formats); its bias
stays. Norms, tables, embeddings and the text side are never quantized.
D width, L blocks with those of a ControlNet, C caption channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pixart_rt.bundle import ComponentEntry
from pixart_rt.config import ModelConfig, Precision, Quality, Weights
from pixart_rt.model.component_configs import T5Config
from pixart_rt.model.controlnet_config import CONTROLNET, ControlNetConfig

SIZE = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}  # bytes


def module_bytes(
    component: str,
    config: dict[str, Any],
    precision: Precision,
    weights: Weights = Weights.FULL,
    quality: Quality = Quality.HIGH,
) -> int:
    """Bytes of a component in PyTorch, of which text_side is one, by its config.json."""
    if component == "text_encoder":
        return _text_encoder(T5Config(**config), precision, weights)
    if component == "vae_decoder":
        return _vae_decoder(config) * SIZE[precision]
    model, control = transformer_configs(config)
    copies = 0 if control is None else control.num_copies
    blocks, s, D = model.num_layers + copies, SIZE[precision], model.hidden_size
    if component == "text_side":
        captions = model.caption_channels * D + D + D * D + D
        return (captions + blocks * (4 * D * D + 4 * D)) * s
    block = [(D, 3 * D), (D, D), (D, D), (D, D), (D, 4 * D), (4 * D, D)]
    joints = copies + sum(control is not None and control.takes_control(i) for i in range(copies))
    linears = blocks * block + joints * [(D, D)]
    patches = model.patch_size**2 * model.out_channels
    others = blocks * 6 * D + 2 * D + (model.token_channels + 1) * D + (D + 1) * patches
    total = _matrices(linears, s, weights) + sum(o for _, o in linears) * s + others * s
    if quality is Quality.FAST:  # an fp8 copy of the linears, next to the originals
        total += _matrices(linears, s, Weights.FP8)
    return total


def engine_bytes(folder: Path, entry: ComponentEntry) -> int:
    """Bytes of a component's engine files, their external weights included."""
    variants = () if entry.plugins is None else entry.plugins.parts  # run in place of the others
    return sum((folder / name).stat().st_size for name in entry.files if name not in variants)


def transformer_configs(config: dict[str, Any]) -> tuple[ModelConfig, ControlNetConfig | None]:
    """The model and, where it has one, the ControlNet in a bundle's transformer/config.json."""
    control = config.get(CONTROLNET)
    model = ModelConfig.from_dict({k: v for k, v in config.items() if k != CONTROLNET})
    return model, None if control is None else ControlNetConfig.from_dict(control)


def _matrices(shapes: Iterable[tuple[int, int]], s: int, weights: Weights) -> int:
    if weights is Weights.FULL:
        return sum(i * o for i, o in shapes) * s
    return sum(i * o + o * (4 if weights is Weights.FP8 else 5) for i, o in shapes)


def _text_encoder(t5: T5Config, precision: Precision, weights: Weights) -> int:
    """No linear has a bias; norms are float32 and, in float16, the MLP's last linear too."""
    s, E, F, inner = SIZE[precision], t5.d_model, t5.d_ff, t5.num_heads * t5.d_kv
    wide = 4 if precision is Precision.FP16 else s
    layer = _matrices([(E, inner)] * 3 + [(inner, E), (E, F), (E, F)], s, weights)
    layer += _matrices([(F, E)], wide, weights) + 2 * E * 4
    tables = t5.vocab_size * E + t5.relative_attention_num_buckets * t5.num_heads
    return t5.num_layers * layer + tables * s + E * 4


def _vae_decoder(config: dict[str, Any]) -> int:
    """Numbers in diffusers' decoder: residual blocks of two norms, two 3×3 convolutions and, where
    the channels change, a shortcut; a convolution after every resolution but the last.
    """

    def conv(inputs: int, outputs: int, taps: int = 9) -> int:
        return taps * inputs * outputs + outputs

    def resnet(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) * (inputs != outputs)
        return 2 * inputs + conv(inputs, outputs) + 2 * outputs + conv(outputs, outputs) + shortcut

    widths = list(reversed(config.get("block_out_channels", (64,))))
    deep, last, latents = widths[0], widths[-1], config.get("latent_channels", 4)
    count = conv(latents, latents, 1) * config.get("use_post_quant_conv", True)
    count += conv(latents, deep) + 2 * resnet(deep, deep)
    if config.get("mid_block_add_attention", True):
        count += 2 * deep + 4 * conv(deep, deep, 1)
    for before, width in zip([deep, *widths], widths, strict=False):
        count += resnet(before, width) + config.get("layers_per_block", 1) * resnet(width, width)
    return count + sum(conv(width, width) for width in widths[:-1]) + 2 * last + conv(last, 3)
