"""The linears of a block with what follows them in the same kernel: gate and residual, or GELU.

    linear_gate_residual   out = residual + gate·(x·Wᵀ + b)    ends a half of a block; with gate 1
                                                               (linear_residual) cross-attention
    linear_gelu            y = gelu(x·Wᵀ + b), tanh form       the first linear of the MLP

PixArt-alpha (arXiv:2310.00426), Section 2.3 and Figure 4. B images, N tokens, I inputs, O outputs,
R rows of a table. x is [B, N, I], weight [O, I], bias [O], residual and out [B, N, O]; gate =
table[row] + shared[:, row] with table [R, O] and shared [B, R, O] (float32), an image its own. out
has the residual's dtype, which under autocast is wider than x's.

Traffic of the first: reads x, W and residual, writes out, where the operators apart also write the
product and read it again: 2·B·N·O elements more. In training the product (for the gate's gradient)
or the value before GELU is written too. The epilogue works on the float32 accumulator; `lossless`
rounds where the operators apart do: the product, the gate, gate·product.

What follows the product is a function that the kernel is compiled with (`EPILOGUE`). In inference
GELU is cuBLASLt's own epilogue, and `launch.choice` may name quack's GEMM (quack_linear.py) for the
first. The backward is one elementwise kernel, with sums over the rows of a program that a second
step adds in a fixed order, and two plain matrix products.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels import quack_linear
from pixart_rt.kernels.gate_residual import Gate, gate_of, gate_residual_ref
from pixart_rt.kernels.launch import (
    SM80,
    SM90,
    Operator,
    capability,
    ceil_div,
    choice,
    config,
    direct,
    interpreting,
    launch,
    runs_triton,
)
from pixart_rt.kernels.ln_modulate import modulation, rounded, spread
from pixart_rt.kernels.triton_import import TensorDescriptor, tl, triton

# By compute capability; chosen from the compiler's report (docs/kernels.md), not from timings.
_SQUARE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}
TILES: dict[tuple[int, int], dict[str, int]] = {
    (8, 0): {**_SQUARE, "num_stages": 4},  # 96 KB: registers leave room for one program
    (9, 0): {**_SQUARE, "num_stages": 4},  # 128 KB
    (12, 0): {**_SQUARE, "num_stages": 4},  # 96 of its 99 KB
}
FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4,
           "num_stages": 2}  # fmt: skip
FP8 = {"BLOCK_K": 128}  # 128 bytes a row, as in 16 bits: the widest swizzle of shared memory
SCALE_GROUP = 128  # columns that share a scale where a linear writes its output in fp8
BACKWARD = {"ROWS": 32, "BLOCK_D": 1024, "num_warps": 4}
GROUP_M = tl.constexpr(8)  # rows of tiles that share their columns of W in the L2 cache
SQRT_2_OVER_PI, CUBIC = 0.7978845608028654, 0.044715


def linear_gate_residual_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor | None,
    shared: Tensor | None,
    row: int,
    residual: Tensor,
    lossless: bool = False,
) -> Tensor:
    """The first formula in plain PyTorch; without table and shared the gate is 1."""
    return gate_residual_ref(residual, F.linear(x, weight, bias), table, shared, row, lossless)


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor, lossless: bool = False) -> Tensor:
    """The second formula in plain PyTorch. It rounds before GELU either way."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@triton.jit
def gelu_sigmoid(z):
    """s with gelu(z) = z·s in the tanh form: (1 + tanh u) / 2 = sigmoid(2 u)."""
    twice = 2 * 0.7978845608028654 * (z + 0.044715 * z * z * z)
    return tl.sigmoid(tl.maximum(twice, -80.0))  # exp overflows at 88


@triton.jit
def _tile(num_tokens, O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of rows and of columns: GROUP_M row tiles go through all columns."""
    tiles_m, tiles_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(O, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    return group * GROUP_M + within % size, within // size


# Epilogues: the product's tile, the epilogue's arguments, its tensor descriptor (not among them:
# Triton's launcher does not unpack descriptors in tuples), a gate's row, and where the tile is:
# (image, first row of all images, first column, offsets in y, their mask, columns, their mask).


@triton.jit
def _plain(
    acc, extra, described, row, place,
    O: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The product itself."""
    return acc


@triton.jit
def _gelu(
    acc, extra, described, row, place,
    O: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """gelu(product), tanh form."""
    return acc * gelu_sigmoid(acc)


@triton.jit
def _gate_residual(
    acc, extra, described, row, place,
    O: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """residual + gate·product. The residual comes by descriptor or by pointer; no table, no gate.

    extra: residual pointer, table, shared, elements of an image in shared.
    """
    image, start, col, at, mask, cols, col_mask = place
    pointer, table_ptr, shared_ptr, stride = extra
    if table_ptr is not None:
        mine = shared_ptr + image * stride
        gate = modulation(table_ptr, mine, row, cols, col_mask, O, DTYPE, ROUND)
        acc = rounded(acc * gate[None, :], DTYPE, ROUND)
    if described is not None:
        residual = described.load([start.to(tl.int32), col])
    else:
        residual = tl.load(pointer + start * O + at, mask=mask, other=0.0)
    return acc + residual.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "row"])  # what a tuple holds would be all the same
def _linear_kernel(
    x_ptr, weight_ptr, described, vectors, extra, num_tokens, row,
    outputs,
    I: tl.constexpr, O: tl.constexpr, EPILOGUE: tl.constexpr, ROUND: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x and weight by pointers or by DESCRIPTORS. vectors: the bias, and the scales of x's rows or
    of its groups of 128 columns, and of weight's rows; outputs: y, the product, the scales of y's
    groups. What there is none of is None."""
    bias_ptr, x_scale_ptr, group_scale_ptr, weight_scale_ptr = vectors
    y_ptr, product_ptr, y_scale_ptr = outputs
    image = tl.program_id(1).to(tl.int64)  # int64: the offset of a token can pass 2**31
    tile_m, tile_n = _tile(num_tokens, O, BLOCK_M, BLOCK_N)
    # One int64 offset for the tile, int32 inside it: GELU takes 106 registers, not 136, on sm_90.
    start = image * num_tokens + tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < num_tokens - tile_m * BLOCK_M, cols < O
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    PRODUCT: tl.constexpr = bias_ptr.dtype.element_ty  # what the linear alone would give
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first = start.to(tl.int32)
    inner = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        # Past the last row or column another one is read again and never stored: no mask for it.
        x_rows = x_ptr + start * I + (tl.where(row_mask, rows, 0) * I)[:, None]
        w_rows = weight_ptr + (tl.where(col_mask, cols, 0) * I)[:, None]  # weights: under 2**31
    for k in range(0, I, BLOCK_K):
        if DESCRIPTORS:  # zeros past the last row and column
            x = x_ptr.load([first, k])
            w = weight_ptr.load([tile_n * BLOCK_N, k])
        elif I % BLOCK_K == 0:
            x = tl.load(x_rows + (k + inner)[None, :])
            w = tl.load(w_rows + (k + inner)[None, :])
        else:
            inside = ((k + inner) < I)[None, :]
            x = tl.load(x_rows + (k + inner)[None, :], mask=inside, other=0.0)
            w = tl.load(w_rows + (k + inner)[None, :], mask=inside, other=0.0)
        if weight_scale_ptr is None:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        elif group_scale_ptr is None:
            # fp8 products of Hopper lose digits over a long sum: every step has a sum of its own,
            # which is added in float32. max_num_imprecise_acc would do so too, but ptxas then waits
            # for the product inside the loop (C7517) and the kernel takes 12 to 27 registers more.
            acc += tl.dot(x, w.T)
        else:
            at = (image * tl.cdiv(I, 128) + k // 128) * num_tokens + tile_m * BLOCK_M
            scale = tl.load(group_scale_ptr + at + rows, mask=row_mask, other=0.0)
            acc += tl.dot(x, w.T) * scale[:, None]
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + start + rows, mask=row_mask, other=0.0)[:, None]
    if weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + cols, mask=col_mask, other=0.0)[None, :]
    acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = rounded(acc, PRODUCT, ROUND)
    at = rows[:, None] * O + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if product_ptr is not None:
        tl.store(product_ptr + start * O + at, acc.to(PRODUCT), mask=mask)
    place = (image, start, tile_n * BLOCK_N, at, mask, cols, col_mask)
    acc = EPILOGUE(acc, extra, described, row, place, O, DTYPE, ROUND)
    if y_scale_ptr is not None:  # the tile's columns are one group: BLOCK_N is 128
        largest = tl.max(tl.where(col_mask[None, :], tl.abs(acc), 0.0), axis=1)
        scale = tl.maximum(largest, 1e-12) / 448.0
        acc *= (1.0 / scale)[:, None]
        group = (image * tl.cdiv(O, BLOCK_N) + tile_n) * num_tokens + tile_m * BLOCK_M
        tl.store(y_scale_ptr + group + rows, scale, mask=row_mask)
    tl.store(y_ptr + start * O + at, acc.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "row"])
def _linear_backward_kernel(
    dy_ptr, product_ptr, gate, num_tokens, row,
    dproduct_ptr, partial_ptr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The product's gradient on ROWS rows, and over them the sums of dbias and of dgate.

    gate: table, shared, elements of an image in shared; None where GELU follows the product.
    """
    image = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    DTYPE: tl.constexpr = product_ptr.dtype.element_ty
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
    if gate is not None:
        vector = modulation(gate[0], gate[1] + image * gate[2], row, cols, mask, D, DTYPE, False)
    for i in range(ROWS):
        number = tl.program_id(1) * ROWS + i
        at = (image * num_tokens + number) * D + cols
        here = mask & (number < num_tokens)
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        product = tl.load(product_ptr + at, mask=here, other=0.0).to(tl.float32)
        if gate is not None:
            dgate += dy * product
            dproduct = dy * vector
        else:
            s = gelu_sigmoid(product)
            slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * product * product)
            dproduct = dy * (s + product * s * (1 - s) * slope)
        dbias += dproduct
        tl.store(dproduct_ptr + at, dproduct.to(dproduct_ptr.dtype.element_ty), mask=here)
    out = partial_ptr + (image * tl.num_programs(1) + tl.program_id(1)) * 2 * D + cols
    tl.store(out, dbias, mask=mask)
    tl.store(out + D, dgate, mask=mask)


@functools.cache
def default_tiles(arch: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """The configuration on a GPU that no table knows the shape for."""
    if dtype == torch.float32:
        return FLOAT32
    tiles = TILES[max(least for least in TILES if least <= max(arch, SM80))]
    return {**tiles, **FP8} if dtype == torch.float8_e4m3fn else tiles


def _describable(matrix: Tensor) -> bool:
    """Whether a contiguous tensor's rows begin where a tensor descriptor can: at 16 bytes."""
    row = matrix.shape[-1] * matrix.element_size()
    return row % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, rows: int, columns: int, block: list[int]) -> TensorDescriptor:
    """TensorDescriptor(matrix as [rows, columns], ...) without its checks, a third of the time.

    They ask what `_describable` has asked; the innermost stride of a contiguous tensor is 1.
    """
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(_DESCRIPTOR)
    made.base, made.shape, made.strides = matrix, [rows, columns], [columns, 1]
    made.block_shape = block
    return made


_DESCRIPTOR = {  # of its fields, those that have a default: later versions of Triton may add some
    field.name: field.default
    for field in dataclasses.fields(TensorDescriptor)
    if field.default is not dataclasses.MISSING
}


def widened(matrix: Tensor) -> Tensor:
    """fp8 values in float32, for Triton's interpreter, which multiplies no fp8."""
    return matrix.float()


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate: Gate | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    lossless: bool = False,
    store: bool = False,
    op: str = "linear",
) -> tuple[Tensor, Tensor]:
    """(y, product [B, N, O] before what follows it; empty unless `store`).

    What follows is a residual, with or without a gate, GELU, or nothing. `scales` are those of fp8
    x, by rows [B, N] or by groups of 128 columns [B, I/128, N], and of fp8 weight's rows [O].
    `dtype` is y's, by default the residual's or x's. In fp8 (e4m3) y gets scales of groups, which
    are returned in place of the product: float32 [B, O/128, N].
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    (B, N, I), O = x.shape, weight.shape[0]
    if dtype is None:
        dtype = x.dtype if residual is None else residual.dtype
    y = x.new_empty(B, N, O, dtype=dtype)
    quantizes = dtype == torch.float8_e4m3fn
    aside: Tensor | None = None
    if quantizes:
        aside = x.new_empty(B, -(-O // SCALE_GROUP), N, dtype=torch.float32)
    elif store:
        aside = x.new_empty(B, N, O, dtype=bias.dtype)
    arch = capability(x)
    tuned = config(op, x, (B * N, I, O), default_tiles(arch, x.dtype))
    block_m, block_n, block_k = tuned["BLOCK_M"], tuned["BLOCK_N"], tuned["BLOCK_K"]
    assert not quantizes or block_n == SCALE_GROUP, (block_n, "columns share a scale")
    # In float32, without tensor cores, tiles that come by descriptor make the product spill.
    described = (
        arch >= SM90 and x.dtype != torch.float32 and _describable(x) and _describable(weight)
    )
    sources: tuple[Any, Any] = (x, weight)
    row_scale = group_scale = weight_scale = None
    if scales is not None:
        x_scale, weight_scale = scales[0].contiguous(), scales[1].contiguous()
        row_scale, group_scale = (x_scale, None) if x_scale.dim() == 2 else (None, x_scale)
        assert group_scale is None or SCALE_GROUP % block_k == 0, (block_k, "in a group of 128")
        if interpreting():
            sources = (widened(x), widened(weight))
    if described:
        sources = (
            _descriptor(sources[0], B * N, I, [block_m, block_k]),
            _descriptor(sources[1], O, I, [block_n, block_k]),
        )
    row, extra, tile, epilogue = 0, None, None, _gelu if gelu else _plain
    if residual is not None:
        residual = residual.contiguous()
        table = shared = None
        if gate is not None:
            table, shared, row = gate[0].contiguous(), gate[1].contiguous(), gate[2]
        if described and _describable(residual):
            tile = _descriptor(residual, B * N, O, [block_m, block_n])
        stride = None if shared is None else shared.stride(0)
        extra = (residual if tile is None else None, table, shared, stride)
        epilogue = _gate_residual
    launch(
        _linear_kernel, (-(-N // block_m) * -(-O // block_n), B),
        *sources, tile, (bias, row_scale, group_scale, weight_scale), extra, N, row,
        (y, None, aside) if quantizes else (y, aside, None),
        I=I, O=O, EPILOGUE=epilogue, ROUND=lossless, DESCRIPTORS=described, **tuned,
    )  # fmt: skip
    return y, y.new_empty(0) if aside is None else aside


def linear_backward_triton(dy: Tensor, product: Tensor, gate: Gate | None) -> tuple[Tensor, Tensor]:
    """(dproduct [B, N, O], sums [B, 2, O]: dbias, dgate). Without a gate the epilogue was GELU."""
    dy = dy.contiguous()
    B, N, O = product.shape
    dproduct = torch.empty_like(product)
    programs = ceil_div(N, BACKWARD["ROWS"])
    partial = product.new_empty(B, programs, 2, O, dtype=torch.float32)
    arguments, row = None, 0
    if gate is not None:
        table, shared, row = gate[0].contiguous(), gate[1].contiguous(), gate[2]
        arguments = (table, shared, shared.stride(0))
    launch(
        _linear_backward_kernel, (ceil_div(O, BACKWARD["BLOCK_D"]), programs, B),
        dy, product, arguments, N, row, dproduct, partial, D=O, **BACKWARD,
    )  # fmt: skip
    return dproduct, partial.sum(1)


def gate_backward_ref(
    dy: Tensor, product: Tensor, table: Tensor, shared: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(dproduct, sums [B, 2, O]: dbias, dgate) of residual + gate·product."""
    wide = torch.promote_types(product.dtype, torch.float32)
    dy = dy.to(wide)
    dproduct = dy * (table[row].to(wide) + shared[:, row, None].to(wide))
    sums = torch.stack([dproduct.sum(1), (dy * product.to(wide)).sum(1)], 1)
    return dproduct.to(product.dtype), sums


def gelu_backward_ref(dy: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """(dproduct, sums [B, 2, O]: dbias, zeros) of gelu(product), tanh form."""
    wide = torch.promote_types(product.dtype, torch.float32)
    z = product.to(wide)
    s = torch.sigmoid(2 * SQRT_2_OVER_PI * (z + CUBIC * z**3))
    slope = 2 * SQRT_2_OVER_PI * (1 + 3 * CUBIC * z**2)
    dproduct = dy.to(wide) * (s + z * s * (1 - s) * slope)
    sums = dproduct.sum(1)
    return dproduct.to(product.dtype), torch.stack([sums, torch.zeros_like(sums)], 1)


def _named(x: Tensor, weight: Tensor) -> str:
    """The GEMM that a table names for linear_gate_residual of these shapes."""
    shape = (x.shape[0] * x.shape[1], x.shape[2], weight.shape[0])
    return choice("linear_gate_residual", x, shape, "own")


def _linear_gate_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor | None,
    shared: Tensor | None,
    row: int,
    residual: Tensor,
    lossless: bool,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """(out, product [B, N, O] for the backward; empty unless `store`)."""
    gate = gate_of(table, shared, row)
    if not (store or lossless) and _named(x, weight) == "quack":
        out = quack_linear.gate_residual(x, weight, bias, gate, residual)
        if out is not None:
            return out, x.new_empty(0)
    if runs_triton("linear_gate_residual", x, SM80) and x.dtype != torch.float64:
        return linear_triton(
            x, weight, bias, gate=gate, residual=residual, lossless=lossless, store=store,
            op="linear_gate_residual",
        )  # fmt: skip
    product = F.linear(x, weight, bias)
    out = gate_residual_ref(residual, product, table, shared, row, lossless).contiguous()
    return out, product if store else product.new_empty(0)


linear_gate_residual_op = torch.library.custom_op(
    "pixart_rt::linear_gate_residual", _linear_gate_residual, mutates_args=()
)


@linear_gate_residual_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor | None,
    shared: Tensor | None,
    row: int,
    residual: Tensor,
    lossless: bool,
    store: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return residual.new_empty(shape), x.new_empty(shape if store else (0,))


def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, lossless: bool, store: bool
) -> tuple[Tensor, Tensor]:
    """(y, product [B, N, O] for the backward; empty unless `store`)."""
    if runs_triton("linear_gelu", x, SM80) and x.dtype != torch.float64 and not lossless:
        if store or not x.is_cuda or x.dtype == torch.float32:
            return linear_triton(x, weight, bias, gelu=True, store=store, op="linear_gelu")
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], -1), x.new_empty(0)
    product = F.linear(x, weight, bias)
    y = F.gelu(product, approximate="tanh")
    return y, product if store else product.new_empty(0)


linear_gelu_op = torch.library.custom_op("pixart_rt::linear_gelu", _linear_gelu, mutates_args=())


@linear_gelu_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, lossless: bool, store: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if store else (0,))


@torch.library.custom_op("pixart_rt::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor, product: Tensor, table: Tensor | None, shared: Tensor | None, row: int
) -> tuple[Tensor, Tensor]:
    """(dproduct, sums [B, 2, O]: dbias, dgate) through the gate, or through GELU without one."""
    gate = gate_of(table, shared, row)
    name = "linear_gelu" if gate is None else "linear_gate_residual"
    if runs_triton(name, product, SM80) and product.dtype != torch.float64:
        return linear_backward_triton(dy, product, gate)
    if gate is None:
        return gelu_backward_ref(dy, product)
    return gate_backward_ref(dy, product, *gate)


@linear_backward_op.register_fake
def _(
    dy: Tensor, product: Tensor, table: Tensor | None, shared: Tensor | None, row: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(product.dtype, torch.float32)
    B, _, O = product.shape
    return product.new_empty(product.shape), product.new_empty((B, 2, O), dtype=wide)


def _products(
    ctx: Any, dproduct: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, the first two inputs: a plain matrix product each, if wanted."""
    flat = dproduct.flatten(0, -2)
    dx = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
    return dx, flat.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, table, shared, row, _, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1], table, shared)
    ctx.row = row


def _gate_backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, product, table, shared = ctx.saved_tensors
    if table is None:  # x may be narrower than the residual, and so than dy
        dx, dweight = _products(ctx, dy.to(x.dtype), x, weight)
        dbias = dy.sum((0, 1)).to(weight.dtype)
        return dx, dweight, dbias, None, None, None, dy, None, None
    dproduct, sums = linear_backward_op(dy, product, table, shared, ctx.row)
    dx, dweight = _products(ctx, dproduct, x, weight)
    whole = spread(sums[:, 1:], shared, ctx.row)
    dtable, dbias = whole.sum(0).to(table.dtype), sums[:, 0].sum(0).to(weight.dtype)
    return dx, dweight, dbias, dtable, whole.to(shared.dtype), None, dy, None, None


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _gelu_backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, product = ctx.saved_tensors
    dproduct, sums = linear_backward_op(dy, product, None, None, 0)
    dx, dweight = _products(ctx, dproduct, x, weight)
    return dx, dweight, sums[:, 0].sum(0).to(weight.dtype), None, None


linear_gate_residual_op.register_autograd(_gate_backward, setup_context=_gate_setup)
linear_gelu_op.register_autograd(_gelu_backward, setup_context=_gelu_setup)


def _trains(*inputs: Tensor | None) -> bool:
    """Whether a backward may follow, so that the product must be kept."""
    wanted = any(each is not None and each.requires_grad for each in inputs)
    return torch.is_grad_enabled() and wanted


def linear_gate_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    residual: Tensor,
    lossless: bool = False,
) -> Tensor:
    """residual + gate·(x·Wᵀ + b), [B, N, O] in residual's dtype. Differentiable in all tensors."""
    if direct(x, weight, bias, table, shared, residual):
        return _linear_gate_residual(
            x, weight, bias, table, shared, row, residual, lossless, False
        )[0]
    store = _trains(x, weight, bias, table, shared, residual)
    out: Tensor = linear_gate_residual_op(
        x, weight, bias, table, shared, row, residual, lossless, store
    )[0]
    return out


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, lossless: bool = False
) -> Tensor:
    """residual + x·Wᵀ + b, [B, N, O], in residual's dtype. Differentiable in every tensor."""
    plain = direct(x, weight, bias, residual)
    call = _linear_gate_residual if plain else linear_gate_residual_op
    out: Tensor = call(x, weight, bias, None, None, 0, residual, lossless, False)[0]
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, lossless: bool = False) -> Tensor:
    """gelu(x·Wᵀ + b), tanh form, [B, N, O]. Differentiable in every tensor."""
    if direct(x, weight, bias):
        return _linear_gelu(x, weight, bias, lossless, False)[0]
    y: Tensor = linear_gelu_op(x, weight, bias, lossless, _trains(x, weight, bias))[0]
    return y


PRODUCTS = (torch.ops.pixart_rt.linear_gate_residual, torch.ops.pixart_rt.linear_gelu)


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size, each with its own gate, and an outlier channel."""
    random = torch.Generator().manual_seed(seed)
    x, residual = (
        torch.randn(3, 37, 144, generator=random),
        torch.randn(3, 37, 200, generator=random),
    )
    x[..., 5] *= 30
    weight, bias = torch.randn(200, 144, generator=random) / 12, torch.randn(200, generator=random)
    table, shared = torch.randn(6, 200, generator=random), torch.randn(3, 6, 200, generator=random)
    half = [each.to(device, dtype) for each in (x, weight, bias, table)]
    return *half, shared.to(device), 5, residual.to(device, dtype)


def _gelu_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    return _example(device, dtype, seed)[:3]


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterable[tuple[Any, ...]]:
    """XL's attention projection and second linear of the MLP, of ragged images."""
    for inner in (1152, 4608):
        random = torch.Generator().manual_seed(seed)
        x, residual = (torch.randn(2, 37, n, generator=random) for n in (inner, 1152))
        weight = torch.randn(1152, inner, generator=random) / inner**0.5
        bias, table = torch.randn(1152, generator=random), torch.randn(6, 1152, generator=random)
        shared = torch.randn(2, 6, 1152, generator=random).to(device)
        half = [each.to(device, dtype) for each in (x, weight, bias, table)]
        yield *half, shared, 5, residual.to(device, dtype)


def _gelu_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(2, 37, 1152, generator=random), torch.randn(4608, generator=random)
    weight = torch.randn(4608, 1152, generator=random) / 34
    yield tuple(each.to(device, dtype) for each in (x, weight, bias))


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B rows of N tokens at XL's widths, for `launch.record`."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    gate = (empty(6, 1152), torch.empty(B, 6, 1152), 5)
    x, y, hidden = empty(B, N, 1152), empty(B, N, 1152), empty(B, N, 4608)
    bias = empty(1152)
    for inner, source in ((1152, x), (4608, hidden)):
        weight = empty(1152, inner)
        for store in (False, True):
            linear_triton(source, weight, bias, gate=gate, residual=y, store=store,
                          op="linear_gate_residual")  # fmt: skip
        linear_triton(source, weight, bias, residual=y, op="linear_gate_residual")
        if dtype != torch.float32:  # autocast's training: the residual stream is float32
            wide = torch.empty(B, N, 1152)
            linear_triton(source, weight, bias, gate=gate, residual=wide, store=True,
                          op="linear_gate_residual")  # fmt: skip
            linear_triton(source, weight, bias, residual=wide, op="linear_gate_residual")
            linear_backward_triton(wide, y, gate)
    for store in (False, True):
        linear_triton(x, empty(4608, 1152), empty(4608), gelu=True, store=store, op="linear_gelu")
    linear_backward_triton(y, y, gate)
    linear_backward_triton(hidden, hidden, None)


OPERATORS = (
    Operator(
        "linear_gate_residual", SM80, linear_gate_residual, linear_gate_residual_ref, _example,
        production=_production,
    ),
    Operator(
        "linear_gelu", SM80, linear_gelu, linear_gelu_ref, _gelu_example,
        production=_gelu_production,
    ),
)  # fmt: skip
