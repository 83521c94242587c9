"""FLOPs of a training step from shapes alone, and from them how busy a GPU was: MFU and HFU.

    MFU = FLOPs that the model needs / seconds / peak          (PaLM, arXiv:2204.02311, Appendix B)
    HFU = the same and what activation checkpointing computes twice / seconds / peak

Only matrix products count, 2 FLOPs a multiply-add; each is 1x in the forward, and in the backward
1x for the gradient of its input and 1x for that of its weight. For an image of N tokens, T text
tokens, width D, C caption channels, patches of P·P and c channels, a block of the text model is

    self-attention   q, k, v, out 8D²N    scores and values 4N²D
    cross-attention  q, out 4D²N    k, v 4D²T    scores and values 4NTD    MLP 16D²N

and outside are patches 2P²cDN, last layer 2DP²(2c)N, captions 2T(CD + D²), timestep 2(256D + 7D²).
The usual 3 x forward also counts gradients of latents, captions and timesteps, which nobody
computes: 0.1 % more for XL/2 at 256 px. What attention's backward recomputes of its scores counts
in neither, as is usual.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from pixart_rt.config import ModelConfig
from pixart_rt.model.dit import DiTConfig
from pixart_rt.model.embeddings import FREQUENCY_CHANNELS

TEXT_LINEAR = "cross_attn.kv_linear"  # the linear of a block that reads captions


class Part(StrEnum):
    """The parts of a model that are trained or frozen as a whole."""

    PATCHES = "patches"
    CAPTIONS = "captions"
    """The caption projection."""
    TIMESTEP = "timestep"
    """Timestep, size and aspect ratio to modulation."""
    BLOCKS = "blocks"
    ADAPTERS = "adapters"
    """LoRA's own products, in the blocks."""
    FINAL = "final"


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A matrix product, in FLOPs of an image's forward."""

    part: Part
    flops: int
    after: Part | None = Part.BLOCKS  # whose output it reads; None: data, which has no gradient
    has_weight: bool = True  # False: of two activations, as in attention


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of an image in a training step."""

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def model(self) -> int:
        """What MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What HFU counts."""
        return self.model + self.recomputed


def step_flops(
    products: Sequence[Product],
    *,
    frozen: Collection[Part] = (),
    full_checkpointing: bool = False,
) -> StepFlops:
    """A training step on one image.

    `frozen` parts get no weight gradients; gradients still pass through all of the blocks, as LoRA
    and ControlNet need them. (Those of the very first query, key and value's input are counted also
    where all before it is frozen and nobody needs them.) Full checkpointing runs each block's
    forward again, with its adapters. The selective policy of kernels/checkpointing.py keeps every
    product's result and recomputes none: leave it False.
    """
    backward = 0
    for each in products:
        flows = each.after is Part.BLOCKS or (each.after is not None and each.after not in frozen)
        if not each.has_weight:
            backward += 2 * each.flops
            continue
        backward += each.flops * ((each.part not in frozen) + flows)
    return StepFlops(
        forward=sum(each.flops for each in products),
        backward=backward,
        recomputed=sum(each.flops for each in products if each.part in (Part.BLOCKS, Part.ADAPTERS))
        if full_checkpointing
        else 0,
    )


def text_model(config: ModelConfig, num_tokens: int, text_tokens: int) -> list[Product]:
    """The products of PixArtTransformer and its modulator for one image.

    text_tokens are those the model is given, padding included. An image of a ControlNet's copied
    blocks costs what `blocks` gives for their number.
    """
    D, N, T = config.hidden_size, num_tokens, text_tokens
    captions = Part.CAPTIONS
    return [
        _linear(Part.PATCHES, N, config.token_channels, D, after=None),
        _linear(captions, T, config.caption_channels, D, after=None),
        _linear(captions, T, D, D, after=captions),
        *_modulator(config),
        *blocks(config, config.num_layers, N, T),
        _linear(Part.FINAL, N, D, config.patch_size**2 * config.out_channels),
    ]


def blocks(config: ModelConfig, count: int, num_tokens: int, text_tokens: int) -> list[Product]:
    """The products of `count` blocks of the text model for one image."""
    D, N, T = config.hidden_size, num_tokens, text_tokens
    part = Part.BLOCKS
    return [
        *_self_attention_and_mlp(D, count, N),
        _linear(part, N, D, 2 * D, count=count),  # cross-attention's q and out
        _linear(part, T, D, 2 * D, after=Part.CAPTIONS, count=count),  # k and v
        _attention(count, N, T, D),
    ]


def adapters(
    linears: Iterable[tuple[str, int, int, int]], num_tokens: int, text_tokens: int
) -> Iterator[Product]:
    """The products of LoRA adapters for one image: A of a linear's input, B of what A gives.

    linears: the name in its block, inputs, rank and outputs of each. Keys and values of the text
    read captions, all others image tokens.
    """
    part = Part.ADAPTERS
    for name, inputs, rank, outputs in linears:
        of_text = name == TEXT_LINEAR
        rows = text_tokens if of_text else num_tokens
        after = Part.CAPTIONS if of_text else Part.BLOCKS
        yield _linear(part, rows, inputs, rank, after=after)
        yield _linear(part, rows, rank, outputs, after=part)


def dit(config: DiTConfig, num_tokens: int) -> list[Product]:
    """The products of a DiT for one image; its modulation is each block's own."""
    shape = config.backbone()
    D, N, L = shape.hidden_size, num_tokens, config.num_layers
    timestep = Part.TIMESTEP
    return [
        _linear(Part.PATCHES, N, shape.token_channels, D, after=None),
        _linear(timestep, 1, FREQUENCY_CHANNELS, D, after=None),
        _linear(timestep, 1, D, D, after=timestep),
        *_self_attention_and_mlp(D, L, N),
        _linear(Part.BLOCKS, 1, D, 6 * D, after=timestep, count=L),
        _linear(Part.FINAL, 1, D, 2 * D, after=timestep),
        _linear(Part.FINAL, N, D, config.patch_size**2 * config.out_channels),
    ]


def _modulator(config: ModelConfig) -> Iterator[Product]:
    D, F, part = config.hidden_size, FREQUENCY_CHANNELS, Part.TIMESTEP
    yield _linear(part, 1, F, D, after=None)
    yield _linear(part, 1, D, D, after=part)
    yield _linear(part, 1, D, 6 * D, after=part)
    if config.micro_conditioning:  # height, width and aspect ratio
        yield _linear(part, 3, F, D // 3, after=None)
        yield _linear(part, 3, D // 3, D // 3, after=part)


def _self_attention_and_mlp(D: int, count: int, N: int) -> list[Product]:
    part = Part.BLOCKS
    return [
        _linear(part, N, D, 4 * D, count=count),  # q, k, v and out
        _attention(count, N, N, D),
        _linear(part, N, D, 8 * D, count=count),  # both linears of the MLP
    ]


def _linear(
    part: Part,
    rows: int,
    inner: int,
    out: int,
    *,
    after: Part | None = Part.BLOCKS,
    count: int = 1,
) -> Product:
    return Product(part=part, flops=2 * rows * inner * out * count, after=after)


def _attention(count: int, queries: int, keys: int, D: int) -> Product:
    """Scores and their product with the values, over all heads."""
    return Product(part=Part.BLOCKS, flops=4 * queries * keys * D * count, has_weight=False)


_HALF = frozenset({torch.float16, torch.bfloat16})
_PEAKS: tuple[tuple[str, float, frozenset[torch.dtype]], ...] = (
    # Names as the driver gives them; dense tensor-core peaks, TFLOP/s, of NVIDIA's datasheets:
    # "V100 Tensor Core GPU" (2020), "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023)
    # and "H200 Tensor Core GPU" (2024). The last two print rates with sparsity, twice these.
    (r"V100-SXM[23]\b", 125.0, frozenset({torch.float16})),
    (r"V100S-PCIE\b", 130.0, frozenset({torch.float16})),
    (r"V100-PCIE\b", 112.0, frozenset({torch.float16})),
    (r"A100\b", 312.0, _HALF),
    (r"H100 80GB HBM3\b", 989.5, _HALF),
    (r"H100 NVL\b", 835.5, _HALF),
    (r"H100 PCIe\b", 756.5, _HALF),
    (r"H200 NVL\b", 835.5, _HALF),
    (r"H200$", 989.5, _HALF),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a GPU's tensor cores reach at most in `dtype`, without sparsity.

    device_name is torch.cuda.get_device_name(). None for a device that is not in the table, for a
    slice of one (MIG) and for dtypes without a dense rate here, float32 among them: utilisation is
    then not known, and not guessed.
    """
    if "MIG" in device_name:
        return None
    for pattern, tera, dtypes in _PEAKS:
        if re.search(rf"(?:^|\s){pattern}", device_name):
            return tera * 1e12 if dtype in dtypes else None
    return None
