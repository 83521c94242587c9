"""The registered operators in PyTorch's own, for exporters that know only those.

    exported.run_decompositions(decompositions())

Only forward operators: an exported graph has no backward. Statistics that only a backward reads
(mean, 1/std, log-sum-exp, stored products) come out as empty tensors, for nothing in such a graph
uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels import attention, cross_attention, fp8_linear, linear, ln_modulate
from pixart_rt.kernels.gate_residual import gate_residual_ln_modulate_ref, gate_residual_ref
from pixart_rt.kernels.group_norm_silu import group_norm_silu_ref
from pixart_rt.kernels.solver import cfg_dpmpp_step_ref

_OURS = torch.ops.pixart_rt


def _unused(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _ln_modulate(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return ln_modulate.ln_modulate_ref(x, *arguments[:-1]), _unused(x)


def _gate_residual_ln_modulate(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return *gate_residual_ln_modulate_ref(x, *arguments[:-1]), _unused(x)


def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return attention.attention_qkv_packed_ref(qkv), _unused(qkv)


def _cross_attention(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return cross_attention.cross_attention_ref(q, *arguments), _unused(q)


def _linear_gate_residual(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return linear.linear_gate_residual_ref(x, *arguments[:-1]), _unused(x)


def _linear_gelu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return linear.linear_gelu_ref(x, *arguments[:-1]), _unused(x)


def _fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    reference = fp8_linear.fp8_linear_gelu_ref if gelu else fp8_linear.fp8_linear_ref
    return reference(x, x_scale, weight, weight_scale, bias, dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every forward operator with its decomposition, for `ExportedProgram.run_decompositions`."""
    return {
        _OURS.ln_modulate.default: _ln_modulate,
        _OURS.ln_modulate_fp8.default: ln_modulate.ln_modulate_fp8_ref,
        _OURS.gate_residual.default: gate_residual_ref,
        _OURS.gate_residual_ln_modulate.default: _gate_residual_ln_modulate,
        _OURS.attention_qkv_packed.default: _attention,
        _OURS.cross_attention.default: _cross_attention,
        _OURS.cross_attention_absorbed.default: cross_attention.cross_attention_absorbed_ref,
        _OURS.linear_gate_residual.default: _linear_gate_residual,
        _OURS.linear_gelu.default: _linear_gelu,
        _OURS.quantize_rows.default: ln_modulate.quantize_rows_ref,
        _OURS.fp8_linear.default: _fp8_linear,
        _OURS.fp8_linear_residual.default: fp8_linear.fp8_linear_residual_ref,
        _OURS.cfg_dpmpp_step.default: cfg_dpmpp_step_ref,
        _OURS.group_norm_silu.default: group_norm_silu_ref,
    }
