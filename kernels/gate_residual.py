"""Gated residual, alone or with LayerNorm and adaLN-single modulation of the result, in one pass.

    x' = x + gate·branch                       the end of one half of a block (gate 1 after
    y  = layer_norm(x')·(1 + scale) + shift    cross-attention), and the beginning of the next

`gate_residual` is the first formula, for self-attention, after which no LayerNorm follows;
`gate_residual_ln_modulate` is both.

PixArt-alpha (arXiv:2310.00426), Section 2.3 and Figure 4. B images, N tokens, D width, R rows of a
table. x, branch, x' and y are [B, N, D]. gate = gate_table[gate_row] + gate_shared[:, gate_row];
shift and scale come from rows row and row + 1 of table [R, D] and shared [B, R, D], as in
ln_modulate.py; the gate has its own, for the next half may belong to the next block.

x' has x's dtype; branch and y may have another: under autocast x is float32, they have 16 bits.

Traffic: reads x and branch, writes x' and y: 4·B·N·D elements where the two operators apart move
5·B·N·D. The backward is ln_modulate's kernel, which adds the gradient of x' and goes on through the
gate: reads dy, dx', x' and branch, writes dx and dbranch, no atomics. Of `gate_residual` alone dx
is dx' itself: its backward reads dx' and branch and writes dbranch.

y is computed from x' as it is stored. `lossless` also rounds the gate and gate·branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.launch import (
    SM70,
    Operator,
    ceil_div,
    config,
    direct,
    launch,
    power_of_2,
    runs_triton,
)
from pixart_rt.kernels.ln_modulate import (
    elementwise_tile,
    forward_tile,
    ln_modulate_backward_ref,
    ln_modulate_backward_triton,
    ln_modulate_ref,
    modulated,
    modulation,
    normalized,
    rounded,
    row_stats,
    spread,
    stats_like,
    trains,
)
from pixart_rt.kernels.triton_import import tl, triton

# A tile of the elementwise kernels: few columns, so that a program reads the gate once for many
# rows, and no lane is idle at XL's width of 9·128.
COLUMNS = 128

Gate = tuple[Tensor, Tensor, int]  # table [R, D], shared [B, R, D], row


def gate_of(table: Tensor | None, shared: Tensor | None, row: int) -> Gate | None:
    """The gate's three arguments as one; None for the gate 1."""
    return None if table is None or shared is None else (table, shared, row)


def gate_residual_ref(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    lossless: bool = False,
) -> Tensor:
    """x + gate·branch in plain PyTorch, in float32 or wider; in x's dtype. No table, no gate."""
    wide = x.dtype if lossless else torch.promote_types(x.dtype, torch.float32)
    if gate_table is None or gate_shared is None:
        return (x.to(wide) + branch.to(wide)).to(x.dtype)
    gate = gate_table[gate_row].to(wide) + gate_shared[:, gate_row, None].to(wide)
    return (x.to(wide) + gate * branch.to(wide)).to(x.dtype)


def gate_residual_ln_modulate_ref(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Both formulas in plain PyTorch: (x', y)."""
    x = gate_residual_ref(x, branch, gate_table, gate_shared, gate_row, lossless)
    return x, ln_modulate_ref(x, table, shared, row, lossless, out_dtype)


@triton.jit
def residual_sum(
    x, branch, gate, gate_row, image, cols, mask,
    D: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """x + gate·branch of a tile, rounded as it is stored; gate is (table, shared) or None."""
    if gate is not None:
        gate_table_ptr, gate_shared_ptr = gate
        vector = modulation(
            gate_table_ptr, gate_shared_ptr + image * R * D, gate_row, cols, mask, D, DTYPE, ROUND
        )
        branch = rounded(vector[None, :] * branch, DTYPE, ROUND)
    return rounded(x + branch, DTYPE, True)


@triton.jit(do_not_specialize=["num_tokens", "gate_row"])
def _gate_residual_kernel(
    x_ptr, branch_ptr, gate, num_tokens, gate_row,
    out_ptr,
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * ROWS
    start = (image * num_tokens + first) * D
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    here = (rows < num_tokens - first)[:, None] & mask[None, :]
    at = rows[:, None] * D + cols[None, :]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + at, mask=here, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + start + at, mask=here, other=0.0).to(tl.float32)
    x = residual_sum(x, branch, gate, gate_row, image, cols, mask, D, R, DTYPE, ROUND)
    tl.store(out_ptr + start + at, x.to(DTYPE), mask=here)


@triton.jit(do_not_specialize=["num_tokens", "gate_row"])
def _gate_residual_backward_kernel(
    dout_ptr, branch_ptr, gate, num_tokens, gate_row,
    dbranch_ptr, partial_ptr,
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dbranch of one tile, and dgate summed over its rows; gate is (table, shared)."""
    gate_table_ptr, gate_shared_ptr = gate
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * ROWS
    start = (image * num_tokens + first) * D
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    here = (rows < num_tokens - first)[:, None] & mask[None, :]
    at = rows[:, None] * D + cols[None, :]
    DTYPE: tl.constexpr = dout_ptr.dtype.element_ty
    dout = tl.load(dout_ptr + start + at, mask=here, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + start + at, mask=here, other=0.0).to(tl.float32)
    vector = modulation(
        gate_table_ptr, gate_shared_ptr + image * R * D, gate_row, cols, mask, D, DTYPE, False
    )
    dbranch = dout * vector[None, :]
    tl.store(dbranch_ptr + start + at, dbranch.to(dbranch_ptr.dtype.element_ty), mask=here)
    out = partial_ptr + (image * tl.num_programs(1) + tl.program_id(1)) * D + cols
    tl.store(out, tl.sum(dout * branch, 0), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "gate_row", "row"])
def _gate_residual_ln_modulate_kernel(
    x_ptr, branch_ptr, gate, norm, num_tokens, gate_row, row,
    out_ptr, y_ptr, stats_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, GATE_R: tl.constexpr,
    ROWS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """x' and y of ROWS tokens. `gate` is (table, shared) or None, `norm` (table, shared)."""
    table_ptr, shared_ptr = norm
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
    branch = tl.load(branch_ptr + start * D + at, mask=here, other=0.0).to(tl.float32)
    # Rounded: y and the backward see x' as stored.
    x = residual_sum(x, branch, gate, gate_row, image, cols, mask, D, GATE_R, DTYPE, ROUND)
    tl.store(out_ptr + start * D + at, x.to(DTYPE), mask=here)
    normed, mean, rstd = normalized(x, mask[None, :], D)
    if stats_ptr is not None:
        pair = (start + rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(stats_ptr + pair, tl.join(mean, rstd), mask=inside[:, None])
    mine = shared_ptr + image * R * D
    shift = modulation(table_ptr, mine, row, cols, mask, D, DTYPE, ROUND)
    scale = modulation(table_ptr, mine, row + 1, cols, mask, D, DTYPE, ROUND)
    y = modulated(normed, shift, scale, DTYPE, ROUND)
    tl.store(y_ptr + start * D + at, y.to(y_ptr.dtype.element_ty), mask=here)


def _gate_pointers(gate: Gate | None) -> tuple[tuple[Tensor, Tensor] | None, int, int]:
    """The gate as the kernels take it: (table, shared) or None, its row, and R."""
    if gate is None:
        return None, 0, 0
    return (gate[0].contiguous(), gate[1].contiguous()), gate[2], gate[0].shape[0]


def gate_residual_triton(
    x: Tensor, branch: Tensor, gate: Gate | None, lossless: bool = False
) -> Tensor:
    """x + gate·branch, in x's dtype."""
    x, branch = x.contiguous(), branch.contiguous()
    pointers, row, R = _gate_pointers(gate)
    B, N, D = x.shape
    out = torch.empty_like(x)
    tuned = config("gate_residual", x, (B * N,), elementwise_tile(x))
    launch(
        _gate_residual_kernel, (ceil_div(D, COLUMNS), ceil_div(N, tuned["ROWS"]), B),
        x, branch, pointers, N, row, out, D=D, R=R, BLOCK_D=COLUMNS, ROUND=lossless, **tuned,
    )  # fmt: skip
    return out


def gate_residual_backward_triton(
    dout: Tensor, branch: Tensor, gate: Gate
) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate [B, 1, D])."""
    dout = dout.contiguous()
    pointers, row, R = _gate_pointers(gate)
    B, N, D = branch.shape
    dbranch = torch.empty_like(branch)
    tuned = config("gate_residual_backward", dout, (B * N,), elementwise_tile(dout))
    programs = ceil_div(N, tuned["ROWS"])
    partial = branch.new_empty((B, programs, D), dtype=torch.float32)
    launch(
        _gate_residual_backward_kernel, (ceil_div(D, COLUMNS), programs, B),
        dout, branch, pointers, N, row, dbranch, partial, D=D, R=R, BLOCK_D=COLUMNS, **tuned,
    )  # fmt: skip
    return dbranch, partial.sum(1, keepdim=True)


def gate_residual_ln_modulate_triton(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool = False,
    out_dtype: torch.dtype | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', y, mean and 1/std [B, N, 2] with stats)."""
    x, branch = x.contiguous(), branch.contiguous()
    gate, gate_row, gate_R = _gate_pointers(gate_of(gate_table, gate_shared, gate_row))
    B, N, D = x.shape
    out, y = torch.empty_like(x), torch.empty_like(x, dtype=out_dtype)
    moments = x.new_empty((B, N, 2), dtype=torch.float32) if stats else None
    tuned = config("gate_residual_ln_modulate", x, (B * N,), forward_tile(x))
    launch(
        _gate_residual_ln_modulate_kernel, (ceil_div(N, tuned["ROWS"]), B),
        x, branch, gate, (table.contiguous(), shared.contiguous()), N, gate_row, row,
        out, y, moments,
        D=D, BLOCK_D=power_of_2(D), R=table.shape[0], GATE_R=gate_R, ROUND=lossless, **tuned,
    )  # fmt: skip
    return out, y, moments


@torch.library.custom_op("pixart_rt::gate_residual", mutates_args=())
def gate_residual_op(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    lossless: bool,
) -> Tensor:
    """x' [B, N, D] in x's dtype."""
    if runs_triton("gate_residual", x, SM70, branch.dtype):
        gate = gate_of(gate_table, gate_shared, gate_row)
        return gate_residual_triton(x, branch, gate, lossless)
    out = gate_residual_ref(x, branch, gate_table, gate_shared, gate_row, lossless)
    return out.contiguous()


@gate_residual_op.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    lossless: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def gate_residual_backward_ref(
    dout: Tensor, branch: Tensor, gate_table: Tensor, gate_shared: Tensor, gate_row: int
) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate [B, 1, D] in float32 or wider)."""
    wide = torch.promote_types(dout.dtype, torch.float32)
    dout = dout.to(wide)
    gate = gate_table[gate_row].to(wide) + gate_shared[:, gate_row, None].to(wide)
    dgate = (dout * branch.to(wide)).sum(1, keepdim=True)
    return (dout * gate).to(branch.dtype), dgate


@torch.library.custom_op("pixart_rt::gate_residual_backward", mutates_args=())
def gate_residual_backward_op(
    dout: Tensor, branch: Tensor, gate_table: Tensor, gate_shared: Tensor, gate_row: int
) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate [B, 1, D] in float32 or wider)."""
    if runs_triton("gate_residual", dout, SM70, branch.dtype):
        return gate_residual_backward_triton(dout, branch, (gate_table, gate_shared, gate_row))
    return gate_residual_backward_ref(dout, branch, gate_table, gate_shared, gate_row)


@gate_residual_backward_op.register_fake
def _(
    dout: Tensor, branch: Tensor, gate_table: Tensor, gate_shared: Tensor, gate_row: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dout.dtype, torch.float32)
    B, _, D = branch.shape
    return branch.new_empty(branch.shape), branch.new_empty((B, 1, D), dtype=wide)


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate_table, gate_shared, ctx.row, _ = inputs
    ctx.dtype = branch.dtype
    if gate_table is not None:
        ctx.save_for_backward(branch.contiguous(), gate_table, gate_shared)


def _residual_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.saved_tensors:
        return dout, dout.to(ctx.dtype), None, None, None, None
    branch, gate_table, gate_shared = ctx.saved_tensors
    dbranch, dgate = gate_residual_backward_op(dout, branch, gate_table, gate_shared, ctx.row)
    whole = spread(dgate, gate_shared, ctx.row)
    dtable = whole.sum(0).to(gate_table.dtype)
    return dout, dbranch, dtable, whole.to(gate_shared.dtype), None, None


gate_residual_op.register_autograd(_residual_backward, setup_context=_residual_setup)


def gate_residual(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    lossless: bool = False,
) -> Tensor:
    """x + gate·branch in x's dtype; branch may have another. Differentiable in every tensor.

    Without gate_table and gate_shared the gate is 1.
    """
    if direct(x, branch, gate_table, gate_shared) and runs_triton(
        "gate_residual", x, SM70, branch.dtype
    ):
        return gate_residual_triton(x, branch, gate_of(gate_table, gate_shared, gate_row), lossless)
    out: Tensor = gate_residual_op(x, branch, gate_table, gate_shared, gate_row, lossless)
    return out


@torch.library.custom_op("pixart_rt::gate_residual_ln_modulate", mutates_args=())
def gate_residual_ln_modulate_op(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool,
    out_dtype: torch.dtype | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', y, mean and 1/std [B, N, 2] for the backward; empty unless `stats`)."""
    gate = (gate_table, gate_shared, gate_row)
    if runs_triton("gate_residual_ln_modulate", x, SM70, branch.dtype, out_dtype):
        out, y, moments = gate_residual_ln_modulate_triton(
            x, branch, *gate, table, shared, row, lossless, out_dtype, stats
        )
        return out, y, stats_like(x, False) if moments is None else moments
    out = gate_residual_ref(x, branch, *gate, lossless).contiguous()
    y = ln_modulate_ref(out, table, shared, row, lossless, out_dtype)
    return out, y, row_stats(out) if stats else stats_like(x, False)


@gate_residual_ln_modulate_op.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool,
    out_dtype: torch.dtype | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats_like(x, stats)


def gate_residual_ln_modulate_backward_ref(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch (empty without a gate: it is dx), dgate [B, 1, D], dshared [B, R, D])."""
    wide = stats.dtype
    dnorm, dshared = ln_modulate_backward_ref(dy.to(wide), out.to(wide), stats, table, shared, row)
    dx = dout.to(wide) + dnorm
    if gate_table is None or gate_shared is None:
        mixed = branch.dtype != out.dtype
        dbranch = dx.to(branch.dtype) if mixed else branch.new_empty(0)
        return dx.to(out.dtype), dbranch, stats.new_empty(0), dshared
    gate = gate_table[gate_row].to(wide) + gate_shared[:, gate_row, None].to(wide)
    dgate = (dx * branch.to(wide)).sum(1, keepdim=True)
    return dx.to(out.dtype), (dx * gate).to(branch.dtype), dgate, dshared


@torch.library.custom_op("pixart_rt::gate_residual_ln_modulate_backward", mutates_args=())
def gate_residual_ln_modulate_backward_op(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate [B, 1, D], dshared [B, R, D]).

    Without a gate dgate is empty, and so is dbranch, which is dx, unless its dtype is another.
    """
    if not runs_triton("gate_residual_ln_modulate", out, SM70, branch.dtype, dy.dtype):
        return gate_residual_ln_modulate_backward_ref(
            dout, dy, out, branch, stats, gate_table, gate_shared, gate_row, table, shared, row
        )
    gate = gate_of(gate_table, gate_shared, gate_row)
    dx, dbranch, sums = ln_modulate_backward_triton(
        dy, out, stats, table, shared, row, dout, branch, gate
    )
    if dbranch is None:
        dbranch = branch.new_empty(0)
    dgate = stats.new_empty(0) if gate is None else sums[:, 2:].clone()
    return dx, dbranch, dgate, spread(sums[:, :2], shared, row)


@gate_residual_ln_modulate_backward_op.register_fake
def _(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated = gate_table is not None
    dbranch = branch.new_empty(branch.shape if gated or branch.dtype != out.dtype else (0,))
    dgate = stats.new_empty((out.shape[0], 1, out.shape[2]) if gated else (0,))
    return out.new_empty(out.shape), dbranch, dgate, stats.new_empty(shared.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate_table, gate_shared, gate_row, table, shared, row, _, _, ctx.stats = inputs
    out, _, stats = output
    ctx.mark_non_differentiable(stats)
    # Without a gate the branch's gradient is x's: of the branch only its dtype would be read.
    plain = gate_table is None and branch.dtype == out.dtype
    kept = out if plain else branch.contiguous()
    ctx.save_for_backward(out, kept, stats, gate_table, gate_shared, table, shared)
    ctx.rows = gate_row, row


def _backward(ctx: Any, dout: Tensor, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    assert ctx.stats, "the forward ran without the statistics that its backward reads"
    out, branch, stats, gate_table, gate_shared, table, shared = ctx.saved_tensors
    gate_row, row = ctx.rows
    dx, dbranch, dgate, dshared = gate_residual_ln_modulate_backward_op(
        dout, dy, out, branch, stats, gate_table, gate_shared, gate_row, table, shared, row
    )
    dtable, dshared = dshared.sum(0).to(table.dtype), dshared.to(shared.dtype)
    dgates: tuple[Tensor | None, ...] = None, None
    if gate_table is not None:
        whole = spread(dgate, gate_shared, gate_row)
        dgates = whole.sum(0).to(gate_table.dtype), whole.to(gate_shared.dtype)
    elif branch.dtype == out.dtype:
        dbranch = dx
    return dx, dbranch, *dgates, None, dtable, dshared, None, None, None, None


gate_residual_ln_modulate_op.register_autograd(_backward, setup_context=_setup)


def gate_residual_ln_modulate(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', y) of the formulas above: x' in x's dtype, y too or in `out_dtype`.

    Differentiable in every tensor. Without gate_table and gate_shared the gate is 1: the residual
    of cross-attention. branch may have another dtype than x.
    """
    inputs = x, branch, gate_table, gate_shared, table, shared
    if direct(*inputs) and runs_triton(
        "gate_residual_ln_modulate", x, SM70, branch.dtype, out_dtype
    ):
        return gate_residual_ln_modulate_triton(
            x, branch, gate_table, gate_shared, gate_row, table, shared, row, lossless, out_dtype
        )[:2]
    stats = trains(*inputs)
    out, y, _ = gate_residual_ln_modulate_op(
        x, branch, gate_table, gate_shared, gate_row, table, shared, row, lossless, out_dtype, stats
    )
    return out, y


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size, each with its own modulation, and an outlier channel."""
    random = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, 3, 37, 1152, generator=random).to(device, dtype).unbind()
    x[..., 5] *= 100
    tables = torch.randn(2, 6, 1152, generator=random).to(device, dtype)
    shared = torch.randn(2, 3, 6, 1152, generator=random).to(device)
    return x, branch, tables[0], shared[0], 5, tables[1], shared[1], 3


def _residual_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    return _example(device, dtype, seed)[:5]


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """XL's width with tokens that end inside a tile, with a gate and without."""
    random = torch.Generator().manual_seed(seed)
    for tokens, gated in ((5, True), (67, False), (67, True)):
        x, branch = torch.randn(2, 2, tokens, 1152, generator=random).to(device, dtype).unbind()
        tables = torch.randn(2, 6, 1152, generator=random).to(device, dtype)
        shared = torch.randn(2, 2, 6, 1152, generator=random).to(device)
        gate = (tables[0], shared[0], 5) if gated else (None, None, 0)
        yield x, branch, *gate, tables[1], shared[1], 3


def _residual_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[tuple[Any, ...]]:
    return (inputs[:5] for inputs in _production(device, dtype, seed))


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B rows of N tokens at XL's width, for `launch.record`."""
    branch = torch.empty(B, N, 1152, dtype=dtype, device="meta")
    shared = branch.new_empty(B, 6, 1152, dtype=torch.float32)
    stats = branch.new_empty(B, N, 2, dtype=torch.float32)
    # Under autocast x and the parameters are float32, the branch and y are not.
    for wide in (dtype,) if dtype == torch.float32 else (dtype, torch.float32):
        x, table = branch.to(wide), branch.new_empty(6, 1152, dtype=wide)
        for gate in ((table, shared, 5), None):
            gate_residual_triton(x, branch, gate)
            for store in (False, True):
                gate_table, gate_shared, gate_row = gate or (None, None, 0)
                gate_residual_ln_modulate_triton(
                    x, branch, gate_table, gate_shared, gate_row, table, shared, 0,
                    out_dtype=dtype, stats=store,
                )  # fmt: skip
            ln_modulate_backward_triton(branch, x, stats, table, shared, 0, x, branch, gate)
        gate_residual_backward_triton(x, branch, (table, shared, 5))


OPERATORS = (
    Operator(
        "gate_residual", SM70, gate_residual, gate_residual_ref, _residual_example,
        production=_residual_production, tables=("gate_residual", "gate_residual_backward"),
    ),
    Operator(
        "gate_residual_ln_modulate", SM70, gate_residual_ln_modulate,
        gate_residual_ln_modulate_ref, _example, production=_production,
        tables=("gate_residual_ln_modulate", "ln_modulate_backward"),
    ),
)  # fmt: skip
