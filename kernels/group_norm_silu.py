"""GroupNorm and SiLU of a VAE's ResNet blocks: y = silu(group_norm(x)·weight + bias).

GroupNorm (arXiv:1803.08494) and SiLU (arXiv:1606.08415). B images, C channels in G groups, H×W
pixels. x and y are [B, C, H, W], contiguous or channels-last, y as x; weight and bias are [C].
Statistics are float32 and biased, over a group's C/G channels and all pixels. `silu` false leaves
the activation out. Inference only: no gradients.

Three launches, no atomics, so equal inputs give equal outputs:

    statistics   every program reads some pixels of some channels: mean and squared deviations
                 from it, [B, P, C] each, P programs a channel
    groups       mean and 1/std [B, G] from those of a group, as exact as in one pass
    apply        reads x again, writes y

Traffic: reads x twice, writes y: 3·B·C·H·W elements. Sums of squares are never subtracted, so a
mean far from zero costs no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels.launch import (
    SM70,
    Operator,
    ceil_div,
    config,
    launch,
    power_of_2,
    runs_triton,
)
from pixart_rt.kernels.triton_import import tl, triton

# Elements that a program holds at once. Chosen from the compiler's resource report
# (docs/kernels.md), not from timings.
DEFAULT = {"TILE": 4096, "num_warps": 8}
MAX_COLS = 128  # channels a program takes of a channels-last tensor: 256 bytes of a row in bf16
MAX_PARTS = 1024  # programs a channel's pixels are shared among, at most
GROUP_TILE = 2048  # of their means that the second kernel reads together


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool = True
) -> Tensor:
    """The formula in plain PyTorch, in float32 or wider; y has x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.group_norm(x.to(wide), num_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


@triton.jit
def _aligned(num_pixels, ALIGNED: tl.constexpr):
    """num_pixels in a form of which the compiler sees, if so, that 16 divides it.

    Contiguous channels begin at multiples of it, so wide loads depend on that. Triton would also
    see it by specializing, and compile anew within a request of another size; channels-last needs
    neither.
    """
    if ALIGNED:
        num_pixels = num_pixels // 16 * 16
    return num_pixels


@triton.jit
def _offsets(
    image, pixels, channels, num_pixels, C: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Where [pixels, channels] of an image lie. int64: 32 images of 128 channels at 1024×1024
    pixels hold 2**32 elements."""
    base = image.to(tl.int64) * C * num_pixels
    if CHANNELS_LAST:
        offsets = pixels.to(tl.int64)[:, None] * C + channels[None, :]
    else:
        offsets = channels.to(tl.int64)[None, :] * num_pixels + pixels[:, None]
    return base + offsets


@triton.jit(do_not_specialize=["num_pixels", "per_part"])
def _group_norm_statistics_kernel(
    x_ptr, num_pixels, per_part,
    mean_ptr, squares_ptr,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    num_pixels = _aligned(num_pixels, ALIGNED)
    per_part = per_part // ROWS * ROWS  # it is a multiple: no tile reaches the next part
    part, image = tl.program_id(0), tl.program_id(2)
    channels = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = channels < C
    mean = tl.zeros([COLS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, num_pixels), ROWS):
        pixels = start + tl.arange(0, ROWS)
        inside = (pixels < num_pixels)[:, None] & known[None, :]
        at = _offsets(image, pixels, channels, num_pixels, C, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(num_pixels - start, ROWS).to(tl.float32)
        here = tl.sum(x, 0) / count
        centered = tl.where(inside, x - here[None, :], 0.0)
        before = (start - first).to(tl.float32)  # pixels already in mean and squares
        share = count / (before + count)
        delta = here - mean
        mean += delta * share
        squares += tl.sum(centered * centered, 0) + delta * delta * before * share
    to = (image.to(tl.int64) * tl.num_programs(0) + part) * C + channels
    tl.store(mean_ptr + to, mean, mask=known)
    tl.store(squares_ptr + to, squares, mask=known)


@triton.jit(do_not_specialize=["num_pixels", "per_part", "num_parts"])
def _group_norm_groups_kernel(
    part_mean_ptr, part_squares_ptr, num_pixels, per_part, num_parts, eps,
    mean_ptr, rstd_ptr,
    C: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    columns = image * num_parts * C + group * SIZE + channels
    known = channels < SIZE
    total = (num_pixels * 1.0) * SIZE
    mean = 0.0
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & known[None, :]
        at = columns[None, :] + parts[:, None] * C
        count = tl.minimum(num_pixels - parts * per_part, per_part).to(tl.float32)
        there = tl.load(part_mean_ptr + at, mask=inside, other=0.0)
        mean += tl.sum(there * (count / total)[:, None])
    squares = 0.0
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & known[None, :]
        at = columns[None, :] + parts[:, None] * C
        count = tl.minimum(num_pixels - parts * per_part, per_part).to(tl.float32)
        delta = tl.load(part_mean_ptr + at, mask=inside, other=0.0) - mean
        own = tl.load(part_squares_ptr + at, mask=inside, other=0.0)
        squares += tl.sum(tl.where(inside, own + delta * delta * count[:, None], 0.0))
    tl.store(mean_ptr + image * G + group, mean)
    tl.store(rstd_ptr + image * G + group, tl.rsqrt(squares / total + eps))


@triton.jit(do_not_specialize=["num_pixels"])
def _group_norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, num_pixels,
    y_ptr,
    C: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    num_pixels = _aligned(num_pixels, ALIGNED)
    image = tl.program_id(2)
    channels = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = channels < C
    group = image.to(tl.int64) * G + channels // SIZE
    mean = tl.load(mean_ptr + group, mask=known, other=0.0)
    scale = tl.load(rstd_ptr + group, mask=known, other=0.0)
    scale *= tl.load(weight_ptr + channels, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + channels, mask=known, other=0.0).to(tl.float32)
    pixels = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (pixels < num_pixels)[:, None] & known[None, :]
    at = _offsets(image, pixels, channels, num_pixels, C, CHANNELS_LAST)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def group_norm_silu_triton(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool = True
) -> Tensor:
    """y, laid out as x, which is contiguous or channels-last."""
    B, C, num_pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty_like(x)
    tuned = dict(config("group_norm_silu", x, (B * num_pixels,), DEFAULT))
    tile = tuned.pop("TILE")
    channels_last = not x.is_contiguous()
    if channels_last:
        cols = min(power_of_2(C), MAX_COLS)
        rows = min(tile // cols, power_of_2(num_pixels))
    else:  # pixels side by side; several channels only where they are small
        rows = min(tile, power_of_2(num_pixels))
        cols = min(tile // rows, power_of_2(C))
    tiles = {
        "ROWS": rows, "COLS": cols, "CHANNELS_LAST": channels_last,
        "ALIGNED": not channels_last and num_pixels % 16 == 0, **tuned,
    }  # fmt: skip
    per_part = rows * ceil_div(ceil_div(num_pixels, rows), MAX_PARTS)
    parts = ceil_div(num_pixels, per_part)
    part_mean, part_squares = x.new_empty((2, B, parts, C), dtype=torch.float32).unbind()
    launch(
        _group_norm_statistics_kernel, (parts, ceil_div(C, cols), B),
        x, num_pixels, per_part, part_mean, part_squares, C=C, **tiles,
    )  # fmt: skip
    size = C // num_groups
    block = power_of_2(size)
    mean, rstd = x.new_empty((2, B, num_groups), dtype=torch.float32).unbind()
    launch(
        _group_norm_groups_kernel, (num_groups, B),
        part_mean, part_squares, num_pixels, per_part, parts, eps, mean, rstd,
        C=C, G=num_groups, SIZE=size, BLOCK=block, PARTS=max(1, GROUP_TILE // block), num_warps=4,
    )  # fmt: skip
    launch(
        _group_norm_silu_kernel, (ceil_div(num_pixels, rows), ceil_div(C, cols), B),
        x, weight.contiguous(), bias.contiguous(), mean, rstd, num_pixels, y,
        C=C, G=num_groups, SIZE=size, SILU=silu, **tiles,
    )  # fmt: skip
    return y


def _dense(x: Tensor) -> Tensor:
    """x as it is where it is contiguous or channels-last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


@torch.library.custom_op("pixart_rt::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool = True
) -> Tensor:
    """y of the formula above, in x's dtype and layout (contiguous if x is neither). No gradients.

    num_groups divides C.
    """
    x = _dense(x)
    if runs_triton("group_norm_silu", x, SM70):
        return group_norm_silu_triton(x, weight, bias, num_groups, eps, silu)
    y = group_norm_silu_ref(x, weight, bias, num_groups, eps, silu)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


@group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool = True
) -> Tensor:
    return torch.empty_like(_dense(x))


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Two channels-last images of a ragged size, with outlier channels and a mean far from 0."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 192, 23, 37, generator=random) * 2 + 3
    x[:, 5] *= 30
    weight, bias = torch.randn(2, 192, generator=random).to(device, dtype).unbind()
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, bias, 32, 1e-6


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """An SD VAE's widest and narrowest layers in both layouts, with few pixels."""
    random = torch.Generator().manual_seed(seed)
    for channels, layout in ((512, torch.channels_last), (128, torch.contiguous_format)):
        x = torch.randn(1, channels, 16, 24, generator=random) + 1
        weight, bias = torch.randn(2, channels, generator=random).to(device, dtype).unbind()
        yield x.to(device, dtype).contiguous(memory_format=layout), weight, bias, 32, 1e-6


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """An SD VAE's narrowest and widest layers and its attention's norm, for `launch.record`.

    Of one image of N patch tokens, twice as many latent pixels a side: B does not matter.
    """
    latent = 2 * round(N**0.5)
    layers = (
        (512, latent, True, True), (512, latent, True, False), (128, 8 * latent, True, True),
        (128, 8 * latent, False, True),
    )  # fmt: skip
    for channels, side, channels_last, silu in layers:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(1, channels, side, side, dtype=dtype, device="meta", memory_format=layout)
        weight = x.new_empty(channels)
        group_norm_silu_triton(x, weight, weight, 32, 1e-6, silu)


OPERATORS = (
    Operator(
        "group_norm_silu", SM70, group_norm_silu, group_norm_silu_ref, _example, trains=False,
        production=_production,
    ),
)  # fmt: skip
