"""LayerNorm and adaLN-single modulation in one pass: y = layer_norm(x)·(1 + scale) + shift.

PixArt-alpha (arXiv:2310.00426), Section 2.3: one set of vectors per image, made from the timestep
and shared by all blocks, plus a table per block:

    shift = table[row] + shared[:, row]          scale = table[row + 1] + shared[:, row + 1]

B images, N tokens, D width, R rows of the table (6 in a block, 2 in the final layer). x and y are
[B, N, D], table [R, D], shared [B, R, D] (float32; every image its own). LayerNorm has no weights
and eps 1e-6. Sums are formed in float32 in the kernel; the [B, R, D] sum is never in memory.

Traffic: reads x, writes y, 2·B·N·D elements, and mean and 1/std of each row, which the backward
takes. The backward reads x and dy, writes dx, and float32 sums of one program's rows, which a
second step adds in a fixed order: no atomics, so equal inputs give equal gradients.

`lossless` repeats the roundings of the unfused model: the sum, the normalized x, 1 + scale and the
product are each rounded to x's dtype. Otherwise only y is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixart_rt.kernels.launch import (
    SM70,
    SM80,
    SM89,
    Operator,
    capability,
    config,
    launch,
    runs_triton,
)

EPS = 1e-6
E4M3_MAX = 448.0  # the largest finite float8_e4m3fn

# Rows a program handles one after the other, and warps. Chosen from the compiler's resource report
# (docs/kernels.md), not from timings.
FORWARD = {"ROWS": 4, "num_warps": 8}
BACKWARD = {"ROWS": 32, "num_warps": 8}  # with 8 warps sm_70's assembler spills 20 bytes


def ln_modulate_ref(
    x: Tensor, table: Tensor, shared: Tensor, row: int = 0, lossless: bool = False
) -> Tensor:
    """The formula in plain PyTorch, in float32 or wider; y has x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if lossless:  # the operators of the unfused model, each rounding to its dtype
        rows = table.to(x.dtype) + shared.to(x.dtype)
        shift, scale = rows[:, row, None], rows[:, row + 1, None]
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    rows = table.to(wide) + shared.to(wide)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
    return (normed * (1 + rows[:, row + 1, None]) + rows[:, row, None]).to(x.dtype)


def ln_modulate_fp8_ref(
    x: Tensor, table: Tensor, shared: Tensor, row: int = 0
) -> tuple[Tensor, Tensor]:
    """ln_modulate, then quantize_rows_ref of the unrounded result."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return quantize_rows_ref(ln_modulate_ref(x.to(wide), table, shared, row))


def quantize_rows_ref(y: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to e4m3 [..., D] and float32 row scales [...] with y = e4m3·scale."""
    y = y.float()
    scale = y.abs().amax(-1).clamp(min=1e-12) / E4M3_MAX
    return (y / scale[..., None]).to(torch.float8_e4m3fn), scale


def ln_modulate_backward_ref(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dshared [B, R, D] in mean's dtype); a table's gradient is their sum."""
    wide = mean.dtype
    normed = (x.to(wide) - mean[..., None]) * rstd[..., None]
    dy = dy.to(wide)
    dnormed = dy * (1 + table[row + 1].to(wide) + shared[:, row + 1, None].to(wide))
    along = normed * (dnormed * normed).mean(-1, keepdim=True)
    dx = (dnormed - dnormed.mean(-1, keepdim=True) - along) * rstd[..., None]
    sums = torch.stack([dy.sum(1), (dy * normed).sum(1)], 1)
    return dx.to(x.dtype), spread(sums, shared, row)


@triton.jit
def rounded(value, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """value (float32) as it is, or rounded once to DTYPE."""
    if ROUND:
        value = value.to(DTYPE).to(tl.float32)
    return value


@triton.jit
def modulation(
    table_ptr, shared_ptr, row, cols, mask,
    D: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One row of the table plus the image's own vector, float32."""
    entry = tl.load(table_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    vector = tl.load(shared_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    return rounded(rounded(entry, DTYPE, ROUND) + rounded(vector, DTYPE, ROUND), DTYPE, ROUND)


@triton.jit
def _ln_modulate_kernel(
    x_ptr, table_ptr, shared_ptr, num_tokens, row, eps,
    y_ptr, row_scale_ptr, mean_ptr, rstd_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    ROUND: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)  # int64: the offset of a token can pass 2**31
    first = tl.program_id(0) * ROWS
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    mine = shared_ptr + image * R * D
    shift = modulation(table_ptr, mine, row, cols, mask, D, DTYPE, ROUND)
    scale = modulation(table_ptr, mine, row + 1, cols, mask, D, DTYPE, ROUND)
    scale = rounded(1.0 + scale, DTYPE, ROUND)
    for i in range(ROWS):
        inside = first + i < num_tokens
        token = image * num_tokens + first + i
        x = tl.load(x_ptr + token * D + cols, mask=mask & inside, other=0.0).to(tl.float32)
        mean = tl.sum(x) / D
        centered = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered) / D + eps)
        y = rounded(rounded(centered * rstd, DTYPE, ROUND) * scale, DTYPE, ROUND) + shift
        if FP8:
            row_scale = tl.maximum(tl.max(tl.where(mask, tl.abs(y), 0.0)), 1e-12) / 448.0
            y = y / row_scale
            tl.store(row_scale_ptr + token, row_scale, mask=inside)
        tl.store(y_ptr + token * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask & inside)
        tl.store(mean_ptr + token, mean, mask=inside)
        tl.store(rstd_ptr + token, rstd, mask=inside)


@triton.jit
def _ln_modulate_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, table_ptr, shared_ptr,
    dresidual_ptr, branch_ptr, gate_table_ptr, gate_shared_ptr,
    num_tokens, row, gate_row,
    dx_ptr, dbranch_ptr, partial_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, GATE_R: tl.constexpr,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dx of one program's rows and its sums over them: dshift, dscale and, GATED, dgate.

    RESIDUAL adds the gradient that reaches x past the normalization; GATED continues through
    x = residual + gate·branch, the operator of gate_residual.py.
    """
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    mine = shared_ptr + image * R * D
    scale = 1.0 + modulation(table_ptr, mine, row + 1, cols, mask, D, DTYPE, False)
    SUMS: tl.constexpr = 3 if GATED else 2
    if GATED:
        gate = modulation(
            gate_table_ptr, gate_shared_ptr + image * GATE_R * D, gate_row, cols, mask,
            D, DTYPE, False,
        )  # fmt: skip
        dgate_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    dshift_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(ROWS):
        inside = first + i < num_tokens
        token = image * num_tokens + first + i
        at = token * D + cols
        here = mask & inside
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + token, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + token, mask=inside, other=0.0)
        normed = tl.where(here, (x - mean) * rstd, 0.0)
        dshift_sum += dy
        dscale_sum += dy * normed
        dnormed = dy * scale
        dx = (dnormed - tl.sum(dnormed) / D - normed * (tl.sum(dnormed * normed) / D)) * rstd
        if RESIDUAL:
            dx += tl.load(dresidual_ptr + at, mask=here, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=here)
        if GATED:
            branch = tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
            dgate_sum += dx * branch
            tl.store(dbranch_ptr + at, (dx * gate).to(dbranch_ptr.dtype.element_ty), mask=here)
    out = partial_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * SUMS * D + cols
    tl.store(out, dshift_sum, mask=mask)
    tl.store(out + D, dscale_sum, mask=mask)
    if GATED:
        tl.store(out + 2 * D, dgate_sum, mask=mask)


def ln_modulate_triton(
    x: Tensor, table: Tensor, shared: Tensor, row: int, *, lossless: bool = False, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, row scales [B, N] (empty without fp8), mean [B, N], 1/std [B, N])."""
    x, table, shared = x.contiguous(), table.contiguous(), shared.contiguous()
    B, N, D = x.shape
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    row_scale = x.new_empty((B, N) if fp8 else 0, dtype=torch.float32)
    mean = x.new_empty(B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tuned = config("ln_modulate", x, (B * N,), FORWARD)
    launch(
        _ln_modulate_kernel, (triton.cdiv(N, tuned["ROWS"]), B),
        x, table, shared, N, row, EPS, y, row_scale, mean, rstd,
        D=D, BLOCK_D=triton.next_power_of_2(D), R=table.shape[0], ROUND=lossless, FP8=fp8, **tuned,
    )  # fmt: skip
    return y, row_scale, mean, rstd


def ln_modulate_backward_triton(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    dresidual: Tensor | None = None,
    branch: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch (empty without a branch), sums [B, 2 or 3, D]: dshift, dscale, dgate).

    `branch` is (branch [B, N, D], its gate's table, shared and row).
    """
    dy, table, shared = dy.contiguous(), table.contiguous(), shared.contiguous()
    B, N, D = x.shape
    default = BACKWARD if capability(x) >= SM80 else {**BACKWARD, "num_warps": 4}
    tuned = config("ln_modulate_backward", x, (B * N,), default)
    programs = triton.cdiv(N, tuned["ROWS"])
    dx = torch.empty_like(x)
    dbranch = x.new_empty(0) if branch is None else torch.empty_like(branch[0])
    partial = x.new_empty(B, programs, 2 if branch is None else 3, D, dtype=torch.float32)
    y, gate_table, gate_shared, gate_row = branch or (x, table, shared, 0)
    launch(
        _ln_modulate_backward_kernel, (programs, B),
        dy, x, mean, rstd, table, shared, dy if dresidual is None else dresidual.contiguous(),
        y.contiguous(), gate_table.contiguous(), gate_shared.contiguous(), N, row, gate_row,
        dx, dbranch, partial,
        D=D, BLOCK_D=triton.next_power_of_2(D), R=table.shape[0], GATE_R=gate_table.shape[0],
        RESIDUAL=dresidual is not None, GATED=branch is not None, **tuned,
    )  # fmt: skip
    return dx, dbranch, partial.sum(1)


def spread(sums: Tensor, like: Tensor, row: int) -> Tensor:
    """Gradients [B, k, D] of rows row..row+k-1 as the gradient of the whole `like` [B, R, D]."""
    whole = sums.new_zeros(like.shape)
    whole[:, row : row + sums.shape[1]] = sums
    return whole


@torch.library.custom_op("pixart_rt::ln_modulate", mutates_args=())
def ln_modulate_op(
    x: Tensor, table: Tensor, shared: Tensor, row: int, lossless: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, N, D] in x's dtype, mean [B, N], 1/std [B, N])."""
    if runs_triton("ln_modulate", x, SM70):
        y, _, mean, rstd = ln_modulate_triton(x, table, shared, row, lossless=lossless)
        return y, mean, rstd
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0)
    y = ln_modulate_ref(x, table, shared, row, lossless).contiguous()
    return y, mean, torch.rsqrt(var + EPS)


@ln_modulate_op.register_fake
def _(
    x: Tensor, table: Tensor, shared: Tensor, row: int, lossless: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    stats = x.new_empty(x.shape[:-1], dtype=wide)
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


@torch.library.custom_op("pixart_rt::ln_modulate_backward", mutates_args=())
def ln_modulate_backward_op(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(dx, dshared [B, R, D] in float32 or wider)."""
    if runs_triton("ln_modulate", x, SM70):
        dx, _, sums = ln_modulate_backward_triton(dy, x, mean, rstd, table, shared, row)
        return dx, spread(sums, shared, row)
    return ln_modulate_backward_ref(dy, x, mean, rstd, table, shared, row)


@ln_modulate_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mean.new_empty(shared.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, table, shared, row, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x.contiguous(), mean, rstd, table, shared)
    ctx.row = row


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *_, table, shared = saved = ctx.saved_tensors
    dx, dshared = ln_modulate_backward_op(dy, *saved, ctx.row)
    return dx, dshared.sum(0).to(table.dtype), dshared.to(shared.dtype), None, None


ln_modulate_op.register_autograd(_backward, setup_context=_setup)


def ln_modulate(
    x: Tensor, table: Tensor, shared: Tensor, row: int = 0, lossless: bool = False
) -> Tensor:
    """y of the formula above: [B, N, D], in x's dtype. Differentiable in x, table and shared."""
    y: Tensor = ln_modulate_op(x, table, shared, row, lossless)[0]
    return y


@torch.library.custom_op("pixart_rt::ln_modulate_fp8", mutates_args=())
def ln_modulate_fp8(x: Tensor, table: Tensor, shared: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """(y in float8_e4m3fn [B, N, D], its row scales [B, N] float32). Inference only."""
    if runs_triton("ln_modulate_fp8", x, SM89):
        return ln_modulate_triton(x, table, shared, row, fp8=True)[:2]
    return ln_modulate_fp8_ref(x, table, shared, row)


@ln_modulate_fp8.register_fake
def _(x: Tensor, table: Tensor, shared: Tensor, row: int) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size, each with its own modulation, and outlier channels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 37, 1152, generator=random) * 2 + 1
    x[..., 5] *= 100
    table = torch.randn(6, 1152, generator=random)
    shared = torch.randn(3, 6, 1152, generator=random)
    return x.to(device, dtype), table.to(device, dtype), shared.to(device), 3


def compile_example(dtype: torch.dtype) -> None:
    """Every launch of this file at 1024 pixels, for `launch.record`."""
    x = torch.empty(2, 4096, 1152, dtype=dtype)
    table, shared = torch.empty(6, 1152, dtype=dtype), torch.empty(2, 6, 1152)
    stats = torch.empty(2, 4096)
    ln_modulate_triton(x, table, shared, 0)
    if capability(x) >= SM89:
        ln_modulate_triton(x, table, shared, 0, fp8=True)
    ln_modulate_backward_triton(x, x, stats, stats, table, shared, 0)


OPERATORS = (
    Operator("ln_modulate", SM70, ln_modulate, ln_modulate_ref, _example),
    Operator("ln_modulate_fp8", SM89, ln_modulate_fp8, ln_modulate_fp8_ref, _example, trains=False),
)
