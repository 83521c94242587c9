"""Linears in fp8 (e4m3) with scales for rows, or for parts of rows, and what follows in the kernel.

    fp8_linear                  y = (x8·W8ᵀ)·x_scale·w_scale + b
    fp8_linear_gelu             gelu(y), tanh form
    fp8_linear_gelu_quantized   the same in e4m3 with scales of groups, as the next linear takes it
    fp8_linear_residual         residual + gate·y

x8 [B, N, I] and W8 [O, I] are float8_e4m3fn, w_scale [O] and x_scale float32, with value =
e4m3·scale and scale = largest magnitude / 448 of what shares it. x_scale [B, N] is of rows
(ViDiT-Q, arXiv:2406.02540, finds rows for tokens and outputs enough for PixArt-alpha); x_scale
[B, I/128, N] is of 128 columns of a row (as in DeepSeek-V3, arXiv:2412.19437, Section 3.3):

    y[t, o] = w_scale[o] · Σ_g x_scale[g, t] · (Σ_(i in g) x8[t, i]·W8[o, i]) + b[o]

A tile of GELU's output sees 128 columns and not the whole row, so it can write those scales, and
the tensor core's sum over a group, of limited precision on Hopper, is added in float32 in any case.
Tokens are x_scale's last index, so that a tile reads neighbours.

From sm_89 on; inference only. Traffic: half of the 16-bit linear's for x and W. ln_modulate.py
writes its output quantized, GELU too; `quantize_rows` does it for what another operator made.
`launch.choice` may name PyTorch's `_scaled_mm` with fast accumulation ("scaled_mm") for fp8_linear.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels.gate_residual import gate_residual_ref
from pixart_rt.kernels.launch import (
    SM89,
    Operator,
    capability,
    choice,
    direct,
    launch,
    power_of_2,
    runs_triton,
)
from pixart_rt.kernels.linear import SCALE_GROUP, linear_triton
from pixart_rt.kernels.ln_modulate import quantize_rows_ref
from pixart_rt.kernels.triton_import import tl, triton


def dequantized(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [B, N, I] times its scales of rows [B, N] or of groups [B, I/128, N], in their dtype."""
    if scale.dim() == 2:
        return x.to(scale.dtype) * scale[..., None]
    columns = scale.transpose(1, 2).repeat_interleave(SCALE_GROUP, -1)
    return x.to(scale.dtype) * columns[..., : x.shape[-1]]


def quantize_groups_ref(y: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, O] to e4m3 [B, N, O] and its scales of 128 columns [B, O/128, N] in y's dtype."""
    O = y.shape[-1]
    groups = -(-O // SCALE_GROUP)
    padded = F.pad(y, (0, groups * SCALE_GROUP - O)).unflatten(-1, (groups, SCALE_GROUP))
    values, scale = quantize_rows_ref(padded)
    return values.flatten(2)[..., :O].contiguous(), scale.transpose(1, 2).contiguous()


def fp8_linear_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The formula in plain PyTorch, in the scales' dtype, float32 in a model; y in `dtype`."""
    wide = x_scale.dtype
    factor = weight.to(wide) * weight_scale[:, None]
    return F.linear(dequantized(x, x_scale), factor, bias.to(wide)).to(dtype)


def fp8_linear_gelu_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gelu of the unrounded y."""
    y = fp8_linear_ref(x, x_scale, weight, weight_scale, bias, torch.float32)
    return F.gelu(y, approximate="tanh").to(dtype)


def fp8_linear_gelu_quantized_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """gelu of the unrounded y, quantized by groups: (e4m3 [B, N, O], scales [B, O/128, N])."""
    y = fp8_linear_ref(x, x_scale, weight, weight_scale, bias, x_scale.dtype)
    return quantize_groups_ref(F.gelu(y, approximate="tanh"))


def fp8_linear_residual_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    table: Tensor | None, shared: Tensor | None, row: int, residual: Tensor,
) -> Tensor:  # fmt: skip
    """residual + gate·y; without table and shared the gate is 1."""
    y = fp8_linear_ref(x, x_scale, weight, weight_scale, bias, torch.float32)
    return gate_residual_ref(residual, y, table, shared, row)


@triton.jit
def _quantize_rows_kernel(x_ptr, y_ptr, scale_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / 448.0
    tl.store(y_ptr + row * D + cols, (x / scale).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 of x's shape, row scales)."""
    x = x.contiguous()
    D = x.shape[-1]
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = power_of_2(D)
    launch(
        _quantize_rows_kernel, (scale.numel(),), x, y, scale, D=D, BLOCK_D=block,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return y, scale


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to float8_e4m3fn [..., D] and float32 row scales [...]: x = e4m3·scale."""
    if runs_triton("quantize_rows", x, SM89):
        return quantize_rows_triton(x)
    return quantize_rows_ref(x)


quantize_rows_op = torch.library.custom_op(
    "pixart_rt::quantize_rows", _quantize_rows, mutates_args=()
)


@quantize_rows_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _scaled_mm_fits(x: Tensor, x_scale: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a table names PyTorch's product for these shapes, and it takes them: scales of rows,
    bfloat16 out, and widths of whole 16 bytes."""
    shape = (x.shape[0] * x.shape[1], x.shape[2], weight.shape[0])
    return (
        choice("fp8_linear", x, shape, "own") == "scaled_mm"
        and x_scale.dim() == 2
        and dtype == torch.bfloat16
        and shape[1] % 16 == 0
        and shape[2] % 16 == 0
    )


def _scaled_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y by cuBLASLt or CUTLASS, which add up in the tensor core's precision ("fast")."""
    y = torch._scaled_mm(
        x.reshape(-1, x.shape[-1]), weight.t(), scale_a=x_scale.reshape(-1, 1),
        scale_b=weight_scale[None], bias=bias.to(dtype), out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    return y.view(*x.shape[:-1], -1)


def _fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [B, N, O], or its GELU, in `dtype`."""
    if not gelu and _scaled_mm_fits(x, x_scale, weight, dtype):
        return _scaled_mm(x, x_scale, weight, weight_scale, bias, dtype)
    if runs_triton("fp8_linear_gelu" if gelu else "fp8_linear", x, SM89, dtype):
        scales = (x_scale, weight_scale)
        return linear_triton(
            x, weight, bias, gelu=gelu, scales=scales, dtype=dtype, op="fp8_linear"
        )[0]
    reference = fp8_linear_gelu_ref if gelu else fp8_linear_ref
    return reference(x, x_scale, weight, weight_scale, bias, dtype)


fp8_linear_op = torch.library.custom_op("pixart_rt::fp8_linear", _fp8_linear, mutates_args=())


@fp8_linear_op.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _fp8_linear_gelu_quantized(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """gelu(y), tanh form, in float8_e4m3fn [B, N, O] with scales of groups [B, O/128, N]."""
    if runs_triton("fp8_linear_gelu_quantized", x, SM89, bias.dtype):
        return linear_triton(
            x, weight, bias, gelu=True, scales=(x_scale, weight_scale), dtype=x.dtype,
            op="fp8_linear_gelu_quantized",
        )  # fmt: skip
    return fp8_linear_gelu_quantized_ref(x, x_scale, weight, weight_scale, bias)


fp8_linear_gelu_quantized_op = torch.library.custom_op(
    "pixart_rt::fp8_linear_gelu_quantized", _fp8_linear_gelu_quantized, mutates_args=()
)


@fp8_linear_gelu_quantized_op.register_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    B, N, O = x.shape[0], x.shape[1], weight.shape[0]
    return x.new_empty((B, N, O)), x_scale.new_empty((B, -(-O // SCALE_GROUP), N))


def _fp8_linear_residual(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    table: Tensor | None,
    shared: Tensor | None,
    row: int,
    residual: Tensor,
) -> Tensor:
    """residual + gate·y [B, N, O] in residual's dtype; without table and shared the gate is 1."""
    if runs_triton("fp8_linear_residual", x, SM89, residual.dtype):
        gate = None if table is None or shared is None else (table, shared, row)
        return linear_triton(
            x, weight, bias, gate=gate, residual=residual, scales=(x_scale, weight_scale),
            dtype=residual.dtype, op="fp8_linear",
        )[0]  # fmt: skip
    return fp8_linear_residual_ref(
        x, x_scale, weight, weight_scale, bias, table, shared, row, residual
    ).contiguous()


fp8_linear_residual_op = torch.library.custom_op(
    "pixart_rt::fp8_linear_residual", _fp8_linear_residual, mutates_args=()
)


@fp8_linear_residual_op.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    table: Tensor | None,
    shared: Tensor | None,
    row: int,
    residual: Tensor,
) -> Tensor:
    return residual.new_empty(residual.shape)


def fp8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y of the formula above, [B, N, O] in `dtype`."""
    call = _fp8_linear if direct(x, x_scale, weight, weight_scale, bias) else fp8_linear_op
    y: Tensor = call(x, x_scale, weight, weight_scale, bias, False, dtype)
    return y


def fp8_linear_gelu(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gelu(y), tanh form, [B, N, O] in `dtype`."""
    call = _fp8_linear if direct(x, x_scale, weight, weight_scale, bias) else fp8_linear_op
    y: Tensor = call(x, x_scale, weight, weight_scale, bias, True, dtype)
    return y


def fp8_linear_gelu_quantized(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """gelu(y), tanh form, in float8_e4m3fn [B, N, O] with scales of groups [B, O/128, N]."""
    plain = direct(x, x_scale, weight, weight_scale, bias)
    call = _fp8_linear_gelu_quantized if plain else fp8_linear_gelu_quantized_op
    y, scale = call(x, x_scale, weight, weight_scale, bias)
    return y, scale


def fp8_linear_residual(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    table: Tensor | None, shared: Tensor | None, row: int, residual: Tensor,
) -> Tensor:  # fmt: skip
    """residual + gate·y [B, N, O] in residual's dtype; without table and shared the gate is 1."""
    plain = direct(x, x_scale, weight, weight_scale, bias, table, shared, residual)
    call = _fp8_linear_residual if plain else fp8_linear_residual_op
    out: Tensor = call(x, x_scale, weight, weight_scale, bias, table, shared, row, residual)
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to float8_e4m3fn [..., D] and float32 row scales [...]: x = e4m3·scale."""
    y, scale = (_quantize_rows if direct(x) else quantize_rows_op)(x)
    return y, scale


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size with an outlier channel."""
    random = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 37, 144, generator=random), torch.randn(200, 144, generator=random)
    x[..., 5] *= 30
    bias = torch.randn(200, generator=random)
    quantized = (*quantize_rows_ref(x), *quantize_rows_ref(weight / 12))
    return *(each.to(device) for each in quantized), bias.to(device, dtype), dtype


def _residual_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(seed + 1)
    table, shared = torch.randn(6, 200, generator=random), torch.randn(3, 6, 200, generator=random)
    residual = torch.randn(3, 37, 200, generator=random).to(device, dtype)
    inputs = _example(device, dtype, seed)[:-1]
    return *inputs, table.to(device, dtype), shared.to(device), 5, residual


def _quantized_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    return _example(device, dtype, seed)[:-1]


def _rows_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 37, 200, generator=random).to(device, dtype),)


def _wide(
    device: torch.device, dtype: torch.dtype, seed: int, I: int, O: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """x of XL's width I in the form that a block gives it, the weight [O, I], and the bias."""
    random = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 37, I, generator=random), torch.randn(O, I, generator=random)
    parts = quantize_rows_ref if I == 1152 else quantize_groups_ref
    quantized = (*parts(x), *quantize_rows_ref(weight / I**0.5))
    bias = torch.randn(O, generator=random).to(device, dtype)
    return tuple(each.to(device) for each in quantized), bias


def _production(device: torch.device, dtype: torch.dtype, seed: int) -> Iterable[tuple[Any, ...]]:
    for out in (1152, 3456):  # the query of cross-attention; packed queries, keys and values
        inputs, bias = _wide(device, dtype, seed, 1152, out)
        yield *inputs, bias, dtype


def _gelu_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Any, ...]]:
    inputs, bias = _wide(device, dtype, seed, 1152, 4608)
    yield *inputs, bias, dtype


def _quantized_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Any, ...]]:
    inputs, bias = _wide(device, dtype, seed, 1152, 4608)
    yield *inputs, bias


def _residual_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Any, ...]]:
    for inner in (1152, 4608):  # scales of rows; of groups, as GELU writes them
        inputs, bias = _wide(device, dtype, seed, inner, 1152)
        random = torch.Generator().manual_seed(seed + 1)
        table, residual = (
            torch.randn(6, 1152, generator=random), torch.randn(2, 37, 1152, generator=random)
        )  # fmt: skip
        shared = torch.randn(2, 6, 1152, generator=random).to(device)
        yield *inputs, bias, table.to(device, dtype), shared, 5, residual.to(device, dtype)


def _rows_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Any, ...]]:
    for width in (1152, 4608):
        random = torch.Generator().manual_seed(seed)
        yield (torch.randn(2, 37, width, generator=random).to(device, dtype),)


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B rows of N tokens at XL's widths, for `launch.record`.

    None before sm_89.
    """
    x_scale = torch.empty(B, N)
    if capability(x_scale) < SM89:
        return

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn)

    gate = (torch.empty(6, 1152, dtype=dtype), torch.empty(B, 6, 1152), 5)
    residual = torch.empty(B, N, 1152, dtype=dtype)
    bias = torch.empty(1152, dtype=dtype)
    for inner, scale in ((1152, x_scale), (4608, torch.empty(B, 4608 // SCALE_GROUP, N))):
        for form in (gate, None):
            linear_triton(
                empty(B, N, inner), empty(1152, inner), bias, gate=form, residual=residual,
                scales=(scale, torch.empty(1152)), op="fp8_linear",
            )  # fmt: skip
    for gelu, out in ((False, 1152), (False, 3456), (True, 4608)):
        scales, bias = (x_scale, torch.empty(out)), torch.empty(out, dtype=dtype)
        linear_triton(empty(B, N, 1152), empty(out, 1152), bias, gelu=gelu, scales=scales,
                      dtype=dtype, op="fp8_linear")  # fmt: skip
    linear_triton(
        empty(B, N, 1152), empty(4608, 1152), bias, gelu=True, scales=scales,
        dtype=torch.float8_e4m3fn, op="fp8_linear_gelu_quantized",
    )  # fmt: skip
    for width in (1152, 4608):
        quantize_rows_triton(torch.empty(B, N, width, dtype=dtype))


_FP8 = ("fp8_linear",)
OPERATORS = (
    Operator("quantize_rows", SM89, quantize_rows, quantize_rows_ref, _rows_example, trains=False,
             production=_rows_production),
    Operator("fp8_linear", SM89, fp8_linear, fp8_linear_ref, _example, trains=False,
             production=_production),
    Operator("fp8_linear_gelu", SM89, fp8_linear_gelu, fp8_linear_gelu_ref, _example, trains=False,
             production=_gelu_production, tables=_FP8),
    Operator("fp8_linear_gelu_quantized", SM89, fp8_linear_gelu_quantized,
             fp8_linear_gelu_quantized_ref, _quantized_example, trains=False,
             production=_quantized_production),
    Operator("fp8_linear_residual", SM89, fp8_linear_residual, fp8_linear_residual_ref,
             _residual_example, trains=False, production=_residual_production, tables=_FP8),
)  # fmt: skip
