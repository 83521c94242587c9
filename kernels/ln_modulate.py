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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels.launch import (
    SM70,
    SM80,
    SM89,
    Operator,
    capability,
    ceil_div,
    config,
    direct,
    launch,
    power_of_2,
    runs_triton,
)
from pixart_rt.kernels.triton_import import tl, triton

EPS = 1e-6
E4M3_MAX = 448.0  # the largest finite float8_e4m3fn

_EPS = tl.constexpr(EPS)

# The defaults below come from counts of instructions and registers (docs/kernels.md), not from
# timings. Few tokens must still give programs to all of an H100's 132 multiprocessors.
LARGE = 4096  # tokens; an image of 512 px with guidance has 2048


def forward_tile(x: Tensor) -> dict[str, int]:
    """The default tile of a forward with LayerNorm: one warp, which needs no barrier.

    More warps would also idle: tiles are 2048 wide, and of XL's 1152 columns one warp goes through
    1280, four or eight through 2048. Two tokens of 16 bits share the loads of the modulation; with
    fewer tokens, or wider ones, which take more registers, a program has one.
    """
    pair = x.numel() >= LARGE * x.shape[-1] and x.element_size() == 2
    return {"ROWS": 2 if pair else 1, "num_warps": 1}


def backward_tile(dy: Tensor) -> dict[str, int]:
    """The default of the backward: about 256 programs that each go through ROWS rows, TILE at once.

    A program's sums are as large as 4 to 6 of its rows, which bounds ROWS from below. With 8 warps
    sm_70's assembler spills; with two rows of float32 throughout sm_80's does.
    """
    rows = power_of_2(dy.numel() // dy.shape[-1] // 256 + 1) // 2
    return {
        "ROWS": min(max(rows, 4), 32),
        "TILE": 2 if dy.element_size() == 2 else 1,
        "num_warps": 8 if capability(dy) >= SM80 else 4,
    }


def elementwise_tile(x: Tensor) -> dict[str, int]:
    """The default tile of kernels without sums over a row: 4 warps, 1 to 4 loads of 16 bytes."""
    tokens = x.numel() // x.shape[-1]
    return {"ROWS": 32 if tokens >= LARGE else 8, "num_warps": 4}


def ln_modulate_ref(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int = 0,
    lossless: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain PyTorch, in float32 or wider; y has x's dtype, or `out_dtype`."""
    # lossless: the operators of the unfused model, each rounding to its dtype
    wide = x.dtype if lossless else torch.promote_types(x.dtype, torch.float32)
    rows = table.to(wide) + shared.to(wide)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
    y = normed * (1 + rows[:, row + 1, None]) + rows[:, row, None]
    return y.to(out_dtype or x.dtype)


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


def row_stats(x: Tensor) -> Tensor:
    """Mean and 1/std of the rows of x [B, N, D]: [B, N, 2], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0)
    return torch.stack([mean, torch.rsqrt(var + EPS)], -1)


def ln_modulate_backward_ref(
    dy: Tensor, x: Tensor, stats: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dshared [B, R, D] in stats' dtype); a table's gradient is their sum."""
    wide, mean, rstd = stats.dtype, *stats.unbind(-1)
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
def normalized(x, mask, D: tl.constexpr):
    """LayerNorm of the rows of a tile [ROWS, BLOCK_D], float32: (normed, mean, 1/std [ROWS]).

    All rows of the tile are summed together: two exchanges between the warps, not two a row.
    """
    mean = tl.sum(x, 1) / D
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / D + _EPS)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def modulated(normed, shift, scale, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """normed·(1 + scale) + shift of a tile; shift and scale are [BLOCK_D]."""
    scale = rounded(1.0 + scale, DTYPE, ROUND)[None, :]
    return rounded(rounded(normed, DTYPE, ROUND) * scale, DTYPE, ROUND) + shift[None, :]


@triton.jit(do_not_specialize=["num_tokens", "row"])
def _ln_modulate_kernel(
    x_ptr, table_ptr, shared_ptr, num_tokens, row,
    y_ptr, row_scale_ptr, stats_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens; with row_scale_ptr quantized by row, with stats_ptr their mean and 1/std.

    The parameters are flat: a TensorRT plugin launches this kernel too.
    """
    image = tl.program_id(1).to(tl.int64)  # int64: the offset of a token can pass 2**31
    first = tl.program_id(0) * ROWS
    start = image * num_tokens + first
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = rows < num_tokens - first
    mask = cols < D
    here = inside[:, None] & mask[None, :]
    at = rows[:, None] * D + cols[None, :]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start * D + at, mask=here, other=0.0).to(tl.float32)
    mine = shared_ptr + image * R * D
    shift = modulation(table_ptr, mine, row, cols, mask, D, DTYPE, ROUND)
    scale = modulation(table_ptr, mine, row + 1, cols, mask, D, DTYPE, ROUND)
    normed, mean, rstd = normalized(x, mask[None, :], D)
    if stats_ptr is not None:
        pair = (start + rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(stats_ptr + pair, tl.join(mean, rstd), mask=inside[:, None])
    y = modulated(normed, shift, scale, DTYPE, ROUND)
    if row_scale_ptr is not None:
        largest = tl.max(tl.where(mask[None, :], tl.abs(y), 0.0), 1)
        row_scale = tl.maximum(largest, 1e-12) / 448.0
        y = y / row_scale[:, None]
        tl.store(row_scale_ptr + start + rows, row_scale, mask=inside)
    tl.store(y_ptr + start * D + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_tokens", "row", "gate_row"])
def _ln_modulate_backward_kernel(
    gradients, x_ptr, stats_ptr, norm, gate, num_tokens, row, gate_row,
    outputs, partial_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, GATE_R: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx of one program's ROWS tokens, TILE at a time, and sums over them: dshift, dscale, dgate.

    `gradients` is (dy, dresidual or None), the gradient that reaches x past the normalization;
    `norm` (table, shared). `gate` is None or (branch, table, shared): it continues through
    x = residual + gate·branch, the operator of gate_residual.py. `outputs` is (dx, dbranch or
    None); without a gate dbranch is dx in another dtype.
    """
    dy_ptr, dresidual_ptr = gradients
    table_ptr, shared_ptr = norm
    dx_ptr, dbranch_ptr = outputs
    image = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    mine = shared_ptr + image * R * D
    scale = 1.0 + modulation(table_ptr, mine, row + 1, cols, mask, D, DTYPE, False)
    dshift_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    if gate is not None:
        branch_ptr, gate_table_ptr, gate_shared_ptr = gate
        gate_vector = modulation(
            gate_table_ptr, gate_shared_ptr + image * GATE_R * D, gate_row, cols, mask,
            D, DTYPE, False,
        )  # fmt: skip
        dgate_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in tl.range(0, ROWS, TILE, num_stages=2):  # the next tile is on its way
        first = tl.program_id(0) * ROWS + i
        start = image * num_tokens + first
        rows = tl.arange(0, TILE)
        inside = rows < num_tokens - first
        here = inside[:, None] & mask[None, :]
        at = start * D + (rows[:, None] * D + cols[None, :])
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + (start + rows) * 2, mask=inside, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + (start + rows) * 2 + 1, mask=inside, other=0.0)[:, None]
        normed = tl.where(here, (x - mean) * rstd, 0.0)
        dshift_sum += tl.sum(dy, 0)
        dscale_sum += tl.sum(dy * normed, 0)
        dnormed = dy * scale[None, :]
        along = tl.sum(dnormed * normed, 1)[:, None] / D
        dx = (dnormed - tl.sum(dnormed, 1)[:, None] / D - normed * along) * rstd
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + at, mask=here, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=here)
        if gate is not None:
            branch = tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
            dgate_sum += tl.sum(dx * branch, 0)
            dx *= gate_vector[None, :]
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=here)
    SUMS: tl.constexpr = 2 if gate is None else 3
    out = partial_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * SUMS * D + cols
    tl.store(out, dshift_sum, mask=mask)
    tl.store(out + D, dscale_sum, mask=mask)
    if gate is not None:
        tl.store(out + 2 * D, dgate_sum, mask=mask)


def ln_modulate_triton(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    *,
    lossless: bool = False,
    fp8: bool = False,
    out_dtype: torch.dtype | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, row scales [B, N] with fp8, mean and 1/std [B, N, 2] with stats)."""
    x = x.contiguous()
    B, N, D = x.shape
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else out_dtype)
    row_scale = x.new_empty((B, N), dtype=torch.float32) if fp8 else None
    moments = x.new_empty((B, N, 2), dtype=torch.float32) if stats else None
    tuned = config("ln_modulate", x, (B * N,), forward_tile(x))
    launch(
        _ln_modulate_kernel, (ceil_div(N, tuned["ROWS"]), B),
        x, table.contiguous(), shared.contiguous(), N, row, y, row_scale, moments,
        D=D, BLOCK_D=power_of_2(D), R=table.shape[0], ROUND=lossless, **tuned,
    )  # fmt: skip
    return y, row_scale, moments


def ln_modulate_backward_triton(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    dresidual: Tensor | None = None,
    branch: Tensor | None = None,
    gate: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, dbranch, sums [B, 2 or 3, D]: dshift, dscale, dgate). x and branch are contiguous.

    `gate` is the branch's: table, shared and row; without one dbranch is dx, None where the branch
    has x's dtype too.
    """
    B, N, D = x.shape
    tuned = config("ln_modulate_backward", x, (B * N,), backward_tile(dy))
    programs = ceil_div(N, tuned["ROWS"])
    dx, dbranch, through = torch.empty_like(x), None, None
    if branch is not None and (gate is not None or branch.dtype != x.dtype):
        dbranch = torch.empty_like(branch)
    if branch is not None and gate is not None:
        through = branch, gate[0].contiguous(), gate[1].contiguous()
    partial = x.new_empty((B, programs, 2 if gate is None else 3, D), dtype=torch.float32)
    launch(
        _ln_modulate_backward_kernel, (programs, B),
        (dy.contiguous(), None if dresidual is None else dresidual.contiguous()), x, stats,
        (table.contiguous(), shared.contiguous()), through, N, row, 0 if gate is None else gate[2],
        (dx, dbranch), partial,
        D=D, BLOCK_D=power_of_2(D), R=table.shape[0],
        GATE_R=0 if gate is None else gate[0].shape[0], **tuned,
    )  # fmt: skip
    return dx, dbranch, partial.sum(1)


def spread(sums: Tensor, like: Tensor, row: int) -> Tensor:
    """Gradients [B, k, D] of rows row..row+k-1 as the gradient of the whole `like` [B, R, D]."""
    whole = sums.new_zeros(like.shape)
    whole[:, row : row + sums.shape[1]] = sums
    return whole


def stats_like(x: Tensor, stats: bool) -> Tensor:
    """What an operator returns for mean and 1/std of x's rows: [B, N, 2], or nothing."""
    shape = (*x.shape[:-1], 2) if stats else (0,)
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("pixart_rt::ln_modulate", mutates_args=())
def ln_modulate_op(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool,
    out_dtype: torch.dtype | None,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """(y [B, N, D], mean and 1/std [B, N, 2] for the backward; empty unless `stats`)."""
    if runs_triton("ln_modulate", x, SM70, out_dtype):
        y, _, moments = ln_modulate_triton(
            x, table, shared, row, lossless=lossless, out_dtype=out_dtype, stats=stats
        )
        return y, stats_like(x, False) if moments is None else moments
    y = ln_modulate_ref(x, table, shared, row, lossless, out_dtype).contiguous()
    return y, row_stats(x) if stats else stats_like(x, False)


@ln_modulate_op.register_fake
def _(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool,
    out_dtype: torch.dtype | None,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), stats_like(x, stats)


@torch.library.custom_op("pixart_rt::ln_modulate_backward", mutates_args=())
def ln_modulate_backward_op(
    dy: Tensor, x: Tensor, stats: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(dx, dshared [B, R, D] in float32 or wider)."""
    if runs_triton("ln_modulate", x, SM70, dy.dtype):
        dx, _, sums = ln_modulate_backward_triton(dy, x, stats, table, shared, row)
        return dx, spread(sums, shared, row)
    return ln_modulate_backward_ref(dy, x, stats, table, shared, row)


@ln_modulate_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, stats: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), stats.new_empty(shared.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, table, shared, ctx.row, _, _, ctx.stats = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x.contiguous(), output[1], table, shared)


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    assert ctx.stats, "ln_modulate ran without the statistics that its backward reads"
    *_, table, shared = saved = ctx.saved_tensors
    dx, dshared = ln_modulate_backward_op(dy, *saved, ctx.row)
    dtable = dshared.sum(0).to(table.dtype)
    return dx, dtable, dshared.to(shared.dtype), None, None, None, None


ln_modulate_op.register_autograd(_backward, setup_context=_setup)


def trains(*inputs: Tensor | None) -> bool:
    """Whether a backward may follow, so that the forward must keep what it reads."""
    if not torch.is_grad_enabled():
        return False
    return any(each is not None and each.requires_grad for each in inputs)


def ln_modulate(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int = 0,
    lossless: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y of the formula above: [B, N, D], in x's dtype or `out_dtype`.

    Differentiable in x, table and shared. `out_dtype` is for autocast, where x is float32 and y
    goes into a linear in 16 bits.
    """
    if direct(x, table, shared) and runs_triton("ln_modulate", x, SM70, out_dtype):
        return ln_modulate_triton(x, table, shared, row, lossless=lossless, out_dtype=out_dtype)[0]
    stats = trains(x, table, shared)
    y: Tensor = ln_modulate_op(x, table, shared, row, lossless, out_dtype, stats)[0]
    return y


@torch.library.custom_op("pixart_rt::ln_modulate_fp8", mutates_args=())
def ln_modulate_fp8(x: Tensor, table: Tensor, shared: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """(y in float8_e4m3fn [B, N, D], its row scales [B, N] float32). Inference only."""
    if runs_triton("ln_modulate_fp8", x, SM89):
        y, row_scale, _ = ln_modulate_triton(x, table, shared, row, fp8=True)
        assert row_scale is not None
        return y, row_scale
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


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """XL's width with tokens that end inside a tile."""
    random = torch.Generator().manual_seed(seed)
    for tokens in (5, 67):
        x = torch.randn(2, tokens, 1152, generator=random).to(device, dtype)
        table = torch.randn(6, 1152, generator=random).to(device, dtype)
        yield x, table, torch.randn(2, 6, 1152, generator=random).to(device), 3


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B rows of N tokens at XL's width, for `launch.record`."""
    x = torch.empty(B, N, 1152, dtype=dtype, device="meta")
    table, shared = x.new_empty(6, 1152), x.new_empty(B, 6, 1152, dtype=torch.float32)
    for store in (False, True):
        ln_modulate_triton(x, table, shared, 0, stats=store)
    if capability(x) >= SM89:
        ln_modulate_triton(x, table, shared, 0, fp8=True)
    stats = x.new_empty(B, N, 2, dtype=torch.float32)
    ln_modulate_backward_triton(x, x, stats, table, shared, 0)
    if dtype != torch.float32:  # autocast: x and the parameters are float32
        wide = x.float()
        ln_modulate_triton(wide, table.float(), shared, 0, out_dtype=dtype, stats=True)
        ln_modulate_backward_triton(x, wide, stats, table.float(), shared, 0)


OPERATORS = (
    Operator(
        "ln_modulate", SM70, ln_modulate, ln_modulate_ref, _example,
        production=_production, tables=("ln_modulate", "ln_modulate_backward"),
    ),
    Operator(
        "ln_modulate_fp8", SM89, ln_modulate_fp8, ln_modulate_fp8_ref, _example, trains=False,
        production=_production, tables=("ln_modulate",),
    ),
)  # fmt: skip
