"""The denoiser at the size of PixArt-XL/2 and the inputs of its loop, on any device.

Weights and inputs are empty tensors: for what runs without looking at values (tensors without data,
a driver that runs nothing), with as few blocks as the test needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import RANDOM_XL, Kernels, ModelConfig, Quality
from pixart_rt.inference.token_loop import LoopInputs, TextInputs
from pixart_rt.model.transformer import PixArtTransformer

STANDARD = 0  # the form of the prompt's text; others are the length that it is absorbed at


def xl(resolution: int, num_layers: int) -> ModelConfig:
    """XL/2 of a resolution with fewer blocks."""
    return replace(RANDOM_XL[resolution], num_layers=num_layers)


def denoiser(
    config: ModelConfig, device: str, dtype: torch.dtype, quality: Quality = Quality.HIGH
) -> DenoiserModule:
    """With the fused operators; memory that nobody wrote to is its weights."""
    with torch.device("meta"):
        core = PixArtTransformer(config).to(dtype)
    core = core.to_empty(device=device).eval().requires_grad_(False)
    return DenoiserModule(core.use(Kernels.FUSED, quality))


def loop_inputs(
    config: ModelConfig,
    images: int,
    form: int,
    device: str,
    dtype: torch.dtype,
    guides: tuple[bool, ...],
    grid: tuple[int, int] | None = None,
) -> LoopInputs:
    """A request's loop: the unconditional text constant, the prompt's as `form` says.

    `grid` is of patches, by default the square of the resolution.
    """
    side = config.sample_size // config.patch_size
    tokens = side * side if grid is None else grid[0] * grid[1]
    channels, width = config.token_channels, config.hidden_size

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    rows = torch.arange(images, device=device)
    return LoopInputs(
        x=empty(images, tokens, channels),
        pos_embed=empty(1, tokens, width),
        modulation=empty(len(guides), images, 7, width),
        coefficients=empty(len(guides), images, 8),
        outputs=torch.arange(channels, device=device),
        plain=None if all(guides) else _text(config, rows[:0], rows, form, dtype),
        guided=_text(config, rows, rows, form, dtype) if any(guides) else None,
        guides=guides,
    )


def _text(
    config: ModelConfig, null_rows: Tensor, text_rows: Tensor, form: int, dtype: torch.dtype
) -> TextInputs:
    layers, heads, width = config.num_layers, config.num_heads, config.hidden_size
    nulls, prompts, device = len(null_rows), len(text_rows), null_rows.device
    tokens = config.max_text_tokens

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    absorbed = {}
    if form != STANDARD:
        absorbed = {
            "absorbed_keys": empty(layers, prompts, heads * form, width),
            "absorbed_bias": empty(layers, prompts, heads, form, dtype=torch.float32),
            "absorbed_values": empty(layers, prompts, heads * form, width),
        }
    return TextInputs(
        null_rows=null_rows,
        text_rows=text_rows,
        constant=empty(layers, nulls, 1, width),
        prompt_mask=empty(prompts, tokens, dtype=torch.bool),
        text_kv=None if absorbed else empty(layers, prompts, tokens, 2, heads, config.head_dim),
        **absorbed,
    )
