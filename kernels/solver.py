"""Guidance and one DPM-Solver++ step in one pass, in float32, on patch tokens.

    eps    = null + g·(cond - null)            classifier-free guidance; without it eps = cond
    x0     = p·x + q·eps                       p = 1/alpha_s, q = -sigma_s/alpha_s
    x_next = a·x + b·x0 + c·x0_last            2M multistep update (arXiv:2211.01095, Algorithm 2)

The six numbers of a step are a row [8] of a table on the device, filled by
pixart_rt/inference/schedulers.py, or a row for each image [B, 8], so that a captured graph serves
every schedule and guidance scale.

B images, N tokens, C latent channels, P = p·p pixels of a patch. x, x0, x0_last and x_next are
float32 [B, N, C·P] in the order of the model's input; output is the model's [B or 2B, N, P·O], the
unconditional half first, O = C or, with a learned variance, which is dropped, 2C. The order of the
two differs, and the kernel reads one while it writes the other: no unpatchify, no chunk, no copy.

Traffic: reads x, x0_last and the C noise channels of both halves, writes x0 and x_next.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.launch import SM70, Operator, launch, runs_triton
from pixart_rt.kernels.triton_import import tl, triton

BLOCK = 1024


class Coefficient(IntEnum):
    """The columns of a step's row: p, q, a, b, c and g of the formulas above. The kernel has them
    as numbers, because Triton takes no enum.
    """

    SAMPLE_TO_X0 = 0  # p
    NOISE_TO_X0 = 1  # q
    SAMPLE = 2  # a
    X0 = 3  # b
    LAST_X0 = 4  # c
    GUIDANCE = 5  # g


ROW = 8  # floats of a row: two spare, so that it has 32 bytes


def cfg_dpmpp_step_ref(
    output: Tensor, x: Tensor, x0_last: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """(x_next, x0), the formulas in plain PyTorch, in x's dtype."""
    used = coefficients[..., : len(Coefficient)].to(x.dtype)
    p, q, a, b, c, guidance = used.reshape(-1, len(Coefficient), 1, 1).unbind(1)
    pixels = x.shape[-1] // channels
    noise = output.to(x.dtype).unflatten(-1, (pixels, -1))[..., :channels]
    noise = noise.transpose(-1, -2).flatten(-2)  # channel first, as the model's input
    if len(noise) != len(x):
        null, cond = noise.chunk(2)
        noise = null + guidance * (cond - null)
    x0 = p * x + q * noise
    return a * x + b * x0 + c * x0_last, x0


@triton.jit(do_not_specialize=["num_images", "num_tokens", "stride"])
def _cfg_dpmpp_step_kernel(
    output_ptr, x_ptr, x0_last_ptr, coefficients_ptr, num_images, num_tokens, stride,
    x_next_ptr, x0_ptr,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    per_image = num_tokens * (C * P)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < per_image
    token, channel, pixel = at // (C * P), at // P % C, at % P
    inside = token * (P * O) + pixel * O + channel  # of one image's output
    output_size = num_tokens * (P * O)
    coefficients_ptr += image * stride  # 0 where all images share a row
    if GUIDED:
        null = tl.load(output_ptr + image * output_size + inside, mask=mask).to(tl.float32)
        cond = output_ptr + (num_images + image) * output_size + inside
        cond = tl.load(cond, mask=mask).to(tl.float32)
        noise = null + tl.load(coefficients_ptr + 5) * (cond - null)
    else:
        noise = tl.load(output_ptr + image * output_size + inside, mask=mask).to(tl.float32)
    here = image * per_image + at
    x = tl.load(x_ptr + here, mask=mask)
    x0 = tl.load(coefficients_ptr) * x + tl.load(coefficients_ptr + 1) * noise
    x_next = tl.load(coefficients_ptr + 2) * x + tl.load(coefficients_ptr + 3) * x0
    x_next += tl.load(coefficients_ptr + 4) * tl.load(x0_last_ptr + here, mask=mask)
    tl.store(x_next_ptr + here, x_next, mask=mask)
    tl.store(x0_ptr + here, x0, mask=mask)


def cfg_dpmpp_step_triton(
    output: Tensor, x: Tensor, x0_last: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """(x_next, x0)."""
    output, x, x0_last = output.contiguous(), x.contiguous(), x0_last.contiguous()
    pixels = x.shape[2] // channels
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    launch(
        _cfg_dpmpp_step_kernel, (-(-x.shape[1] * x.shape[2] // BLOCK), len(x)),
        output, x, x0_last, coefficients.contiguous(), len(x), x.shape[1],
        ROW if coefficients.ndim == 2 else 0, x_next, x0,
        C=channels, P=pixels, O=output.shape[2] // pixels, GUIDED=len(output) != len(x),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return x_next, x0


@torch.library.custom_op("pixart_rt::cfg_dpmpp_step", mutates_args=())
def cfg_dpmpp_step(
    output: Tensor, x: Tensor, x0_last: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """(x_next, x0) of the formulas above; shapes at the top of the file. No gradients.

    x0_last is not used where c is 0, but must be finite: pass x at the first step.
    """
    if runs_triton("cfg_dpmpp_step", output, SM70):
        return cfg_dpmpp_step_triton(output, x, x0_last, coefficients, channels)
    x_next, x0 = cfg_dpmpp_step_ref(output, x, x0_last, coefficients, channels)
    return x_next.contiguous(), x0.contiguous()


@cfg_dpmpp_step.register_fake
def _(
    output: Tensor, x: Tensor, x0_last: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three guided images with a learned variance, at a ragged size."""
    random = torch.Generator().manual_seed(seed)
    output = torch.randn(6, 37, 32, generator=random).to(device, dtype)
    x, x0_last = torch.randn(2, 3, 37, 16, generator=random).to(device).unbind()
    coefficients = torch.randn(8, generator=random).to(device)
    return output, x, x0_last, coefficients, 4


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """Without guidance, and guided with a row of coefficients for each image."""
    random = torch.Generator().manual_seed(seed)
    for rows in (2, 4):
        output = torch.randn(rows, 67, 32, generator=random).to(device, dtype)
        x, x0_last = torch.randn(2, 2, 67, 16, generator=random).to(device).unbind()
        yield output, x, x0_last, torch.randn(2, 8, generator=random).to(device), 4


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """The launches for B rows of N tokens, with guidance and without, for `launch.record`."""
    output = torch.empty(B, N, 32, dtype=dtype, device="meta")
    for images in {B, max(B // 2, 1)}:
        x = torch.empty(images, N, 16, device="meta")
        cfg_dpmpp_step_triton(output, x, x, x.new_empty(8), 4)


OPERATORS = (
    Operator(
        "cfg_dpmpp_step", SM70, cfg_dpmpp_step, cfg_dpmpp_step_ref, _example, trains=False,
        production=_production,
    ),
)  # fmt: skip
