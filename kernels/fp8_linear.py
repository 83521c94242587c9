"""Linears in fp8 (e4m3) with a scale for each row: y = (x8·W8ᵀ)·x_scale·w_scale + b, and epilogues.

    fp8_linear                y
    fp8_linear_gelu           gelu(y), tanh form
    fp8_linear_residual       residual + gate·y

x8 [B, N, I] and W8 [O, I] are float8_e4m3fn, x_scale [B, N] and w_scale [O] float32, with value =
e4m3·scale and scale = largest magnitude / 448 of the row (ViDiT-Q, arXiv:2406.02540, finds rows for
tokens and outputs enough for PixArt-alpha). The scales multiply the float32 sum in the epilogue of
linear.py's kernel. From sm_89 on; inference only.

Traffic: half of the 16-bit linear's for x and W. ln_modulate.py writes its output quantized;
`quantize_rows` does it for what another operator made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixart_rt.kernels.gate_residual import gate_residual_ref
from pixart_rt.kernels.launch import SM89, Operator, capability, launch, runs_triton
from pixart_rt.kernels.linear import linear_triton
from pixart_rt.kernels.ln_modulate import quantize_rows_ref


def fp8_linear_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The formula in plain PyTorch, in the scales' dtype, float32 in a model; y in `dtype`."""
    wide = x_scale.dtype
    factor = weight.to(wide) * weight_scale[:, None]
    return F.linear(x.to(wide) * x_scale[..., None], factor, bias.to(wide)).to(dtype)


def fp8_linear_gelu_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gelu of the unrounded y."""
    y = fp8_linear_ref(x, x_scale, weight, weight_scale, bias, torch.float32)
    return F.gelu(y, approximate="tanh").to(dtype)


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
    block = triton.next_power_of_2(D)
    launch(
        _quantize_rows_kernel, (scale.numel(),), x, y, scale, D=D, BLOCK_D=block,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return y, scale


@torch.library.custom_op("pixart_rt::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to float8_e4m3fn [..., D] and float32 row scales [...]: x = e4m3·scale."""
    if runs_triton("quantize_rows", x, SM89):
        return quantize_rows_triton(x)
    return quantize_rows_ref(x)


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("pixart_rt::fp8_linear", mutates_args=())
def fp8_linear_op(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [B, N, O], or its GELU, in `dtype`."""
    if runs_triton("fp8_linear_gelu" if gelu else "fp8_linear", x, SM89):
        scales = (x_scale, weight_scale)
        return linear_triton(
            x, weight, bias, gelu=gelu, scales=scales, dtype=dtype, op="fp8_linear"
        )[0]
    reference = fp8_linear_gelu_ref if gelu else fp8_linear_ref
    return reference(x, x_scale, weight, weight_scale, bias, dtype)


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


@torch.library.custom_op("pixart_rt::fp8_linear_residual", mutates_args=())
def fp8_linear_residual(
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
    if runs_triton("fp8_linear_residual", x, SM89):
        gate = None if table is None or shared is None else (table, shared, row)
        return linear_triton(
            x, weight, bias, gate=gate, residual=residual, scales=(x_scale, weight_scale),
            dtype=residual.dtype, op="fp8_linear",
        )[0]  # fmt: skip
    return fp8_linear_residual_ref(
        x, x_scale, weight, weight_scale, bias, table, shared, row, residual
    ).contiguous()


@fp8_linear_residual.register_fake
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
    return fp8_linear_op(x, x_scale, weight, weight_scale, bias, False, dtype)


def fp8_linear_gelu(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gelu(y), tanh form, [B, N, O] in `dtype`."""
    return fp8_linear_op(x, x_scale, weight, weight_scale, bias, True, dtype)


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


def _rows_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 37, 200, generator=random).to(device, dtype),)


def compile_example(dtype: torch.dtype) -> None:
    """Every launch of this file at 1024 pixels, for `launch.record`; none before sm_89."""
    x_scale = torch.empty(2, 4096)
    if capability(x_scale) < SM89:
        return

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn)

    table, shared = torch.empty(6, 1152, dtype=dtype), torch.empty(2, 6, 1152)
    residual = torch.empty(2, 4096, 1152, dtype=dtype)
    for inner in (1152, 4608):
        scales = (x_scale, torch.empty(1152))
        bias = torch.empty(1152, dtype=dtype)
        linear_triton(empty(2, 4096, inner), empty(1152, inner), bias, gate=(table, shared, 5),
                      residual=residual, scales=scales, dtype=dtype, op="fp8_linear")  # fmt: skip
    for gelu, out in ((False, 3456), (True, 4608)):
        scales, bias = (x_scale, torch.empty(out)), torch.empty(out, dtype=dtype)
        linear_triton(empty(2, 4096, 1152), empty(out, 1152), bias, gelu=gelu, scales=scales,
                      dtype=dtype, op="fp8_linear")  # fmt: skip
    for width in (1152, 4608):
        quantize_rows_triton(torch.empty(2, 4096, width, dtype=dtype))


OPERATORS = tuple(
    Operator(name, SM89, run, reference, example, trains=False)
    for name, run, reference, example in (
        ("quantize_rows", quantize_rows, quantize_rows_ref, _rows_example),
        ("fp8_linear", fp8_linear, fp8_linear_ref, _example),
        ("fp8_linear_gelu", fp8_linear_gelu, fp8_linear_gelu_ref, _example),
        ("fp8_linear_residual", fp8_linear_residual, fp8_linear_residual_ref, _residual_example),
    )
)
