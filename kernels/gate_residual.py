"""Gated residual, then LayerNorm and adaLN-single modulation of the result, in one pass.

    x' = x + gate·branch                       the end of one half of a block (gate 1 after
    y  = layer_norm(x')·(1 + scale) + shift    cross-attention), and the beginning of the next

PixArt-alpha (arXiv:2310.00426), Section 2.3 and Figure 4. B images, N tokens, D width, R rows of a
table. x, branch, x' and y are [B, N, D]. gate = gate_table[gate_row] + gate_shared[:, gate_row];
shift and scale come from rows row and row + 1 of table [R, D] and shared [B, R, D], as in
ln_modulate.py; the gate has its own, for the next half may belong to the next block.

Traffic: reads x and branch, writes x' and y: 4·B·N·D elements where the two operators apart move
5·B·N·D. The backward is ln_modulate's kernel, which adds the gradient of x' and goes on through the
gate: reads dy, dx', x' and branch, writes dx and dbranch, no atomics.

y is computed from x' as it is stored. `lossless` also rounds the gate and gate·branch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_rt.kernels.launch import SM70, Operator, config, launch, runs_triton
from pixart_rt.kernels.ln_modulate import (
    EPS,
    ln_modulate_backward_ref,
    ln_modulate_backward_triton,
    ln_modulate_ref,
    modulation,
    rounded,
    spread,
)

FORWARD = {"ROWS": 4, "num_warps": 8}  # as in ln_modulate.py


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
) -> tuple[Tensor, Tensor]:
    """Both formulas in plain PyTorch: (x', y)."""
    x = gate_residual_ref(x, branch, gate_table, gate_shared, gate_row, lossless)
    return x, ln_modulate_ref(x, table, shared, row, lossless)


@triton.jit
def _gate_residual_ln_modulate_kernel(
    x_ptr, branch_ptr, gate_table_ptr, gate_shared_ptr, table_ptr, shared_ptr,
    num_tokens, gate_row, row, eps,
    out_ptr, y_ptr, mean_ptr, rstd_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, GATE_R: tl.constexpr,
    ROWS: tl.constexpr, ROUND: tl.constexpr, GATED: tl.constexpr,
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
    if GATED:
        gate = modulation(
            gate_table_ptr, gate_shared_ptr + image * GATE_R * D, gate_row, cols, mask,
            D, DTYPE, ROUND,
        )  # fmt: skip
    for i in range(ROWS):
        inside = first + i < num_tokens
        token = image * num_tokens + first + i
        at = token * D + cols
        here = mask & inside
        branch = tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
        if GATED:
            branch = rounded(gate * branch, DTYPE, ROUND)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32) + branch
        x = rounded(x, DTYPE, True)  # the backward sees x' as stored
        tl.store(out_ptr + at, x.to(DTYPE), mask=here)
        mean = tl.sum(x) / D
        centered = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered) / D + eps)
        y = rounded(rounded(centered * rstd, DTYPE, ROUND) * scale, DTYPE, ROUND) + shift
        tl.store(y_ptr + at, y.to(DTYPE), mask=here)
        tl.store(mean_ptr + token, mean, mask=inside)
        tl.store(rstd_ptr + token, rstd, mask=inside)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean [B, N], 1/std [B, N])."""
    x, branch, table, shared = (each.contiguous() for each in (x, branch, table, shared))
    gate = gate_of(gate_table, gate_shared, gate_row)
    gates = (table, shared) if gate is None else (gate[0].contiguous(), gate[1].contiguous())
    B, N, D = x.shape
    out, y = torch.empty_like(x), torch.empty_like(x)
    mean = x.new_empty(B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tuned = config("gate_residual_ln_modulate", x, (B * N,), FORWARD)
    launch(
        _gate_residual_ln_modulate_kernel, (triton.cdiv(N, tuned["ROWS"]), B),
        x, branch, *gates, table, shared, N, gate_row, row, EPS, out, y, mean, rstd,
        D=D, BLOCK_D=triton.next_power_of_2(D), R=table.shape[0], GATE_R=gates[0].shape[0],
        ROUND=lossless, GATED=gate is not None, **tuned,
    )  # fmt: skip
    return out, y, mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean [B, N], 1/std [B, N])."""
    gate = (gate_table, gate_shared, gate_row)
    if runs_triton("gate_residual_ln_modulate", x, SM70):
        return gate_residual_ln_modulate_triton(x, branch, *gate, table, shared, row, lossless)
    out = gate_residual_ref(x, branch, *gate, lossless).contiguous()
    y = ln_modulate_ref(out, table, shared, row, lossless)
    wide = out.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0)
    return out, y, mean, torch.rsqrt(var + EPS)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, torch.empty_like(mean)


def gate_residual_ln_modulate_backward_ref(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch (empty without a gate: it is dx), dgate [B, 1, D], dshared [B, R, D])."""
    wide = mean.dtype
    dnorm, dshared = ln_modulate_backward_ref(
        dy.to(wide), out.to(wide), mean, rstd, table, shared, row
    )
    dx = dout.to(wide) + dnorm
    if gate_table is None or gate_shared is None:
        return dx.to(out.dtype), out.new_empty(0), mean.new_empty(0), dshared
    gate = gate_table[gate_row].to(wide) + gate_shared[:, gate_row, None].to(wide)
    dgate = (dx * branch.to(wide)).sum(1, keepdim=True)
    return dx.to(out.dtype), (dx * gate).to(branch.dtype), dgate, dshared


@torch.library.custom_op("pixart_rt::gate_residual_ln_modulate_backward", mutates_args=())
def gate_residual_ln_modulate_backward_op(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch (empty without a gate: it is dx), dgate [B, 1, D], dshared [B, R, D])."""
    if not runs_triton("gate_residual_ln_modulate", out, SM70):
        return gate_residual_ln_modulate_backward_ref(
            dout, dy, out, branch, mean, rstd, gate_table, gate_shared, gate_row, table, shared, row
        )
    gate = gate_of(gate_table, gate_shared, gate_row)
    through = None if gate is None else (branch, *gate)
    dx, dbranch, sums = ln_modulate_backward_triton(
        dy, out, mean, rstd, table, shared, row, dout, through
    )
    dgate = mean.new_empty(0) if gate is None else sums[:, 2:].clone()
    return dx, dbranch, dgate, spread(sums[:, :2], shared, row)


@gate_residual_ln_modulate_backward_op.register_fake
def _(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate_table: Tensor | None,
    gate_shared: Tensor | None,
    gate_row: int,
    table: Tensor,
    shared: Tensor,
    row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated = gate_table is not None
    dbranch = branch.new_empty(branch.shape if gated else (0,))
    dgate = mean.new_empty((out.shape[0], 1, out.shape[2]) if gated else (0,))
    return out.new_empty(out.shape), dbranch, dgate, mean.new_empty(shared.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate_table, gate_shared, gate_row, table, shared, row, _ = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(
        out, branch.contiguous(), mean, rstd, gate_table, gate_shared, table, shared
    )
    ctx.rows = gate_row, row


def _backward(ctx: Any, dout: Tensor, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    out, branch, mean, rstd, gate_table, gate_shared, table, shared = ctx.saved_tensors
    gate_row, row = ctx.rows
    dx, dbranch, dgate, dshared = gate_residual_ln_modulate_backward_op(
        dout, dy, out, branch, mean, rstd, gate_table, gate_shared, gate_row, table, shared, row
    )
    dtable = dshared.sum(0).to(table.dtype)
    if gate_table is None:
        return dx, dx, None, None, None, dtable, dshared.to(shared.dtype), None, None
    whole = spread(dgate, gate_shared, gate_row)
    return (
        dx, dbranch, whole.sum(0).to(gate_table.dtype), whole.to(gate_shared.dtype), None,
        dtable, dshared.to(shared.dtype), None, None,
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor]:
    """(x', y) of the formulas above, in x's dtype. Differentiable in every tensor.

    Without gate_table and gate_shared the gate is 1: the residual of cross-attention.
    """
    out, y, _, _ = gate_residual_ln_modulate_op(
        x, branch, gate_table, gate_shared, gate_row, table, shared, row, lossless
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


def compile_example(dtype: torch.dtype) -> None:
    """Every launch of this file at 1024 pixels, for `launch.record`."""
    x = torch.empty(2, 4096, 1152, dtype=dtype)
    table, shared = torch.empty(6, 1152, dtype=dtype), torch.empty(2, 6, 1152)
    stats = torch.empty(2, 4096)
    gate_residual_ln_modulate_triton(x, x, table, shared, 5, table, shared, 0)
    gate_residual_ln_modulate_triton(x, x, None, None, 0, table, shared, 0)
    for through in ((x, table, shared, 5), None):
        ln_modulate_backward_triton(x, x, stats, stats, table, shared, 0, x, through)


OPERATORS = (
    Operator(
        "gate_residual_ln_modulate",
        SM70,
        gate_residual_ln_modulate,
        gate_residual_ln_modulate_ref,
        _example,
    ),
)
