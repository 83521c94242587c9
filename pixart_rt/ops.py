"""The seam between the model and its operators: the model calls these methods and no others.

`operators()` gives one set for all blocks. The reference is plain PyTorch; the fused set calls the
operators registered in kernels/, which run their Triton kernel where they can and their reference
where they cannot.

B images, N tokens, T text tokens, D width, H heads, K head width, R rows of a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt.config import Kernels, Quality, Weights
from pixart_rt.errors import ConfigError
from pixart_rt.kernels.attention import attention_qkv_packed, attention_ref
from pixart_rt.kernels.attention_products import attention_products, trains_by_products
from pixart_rt.kernels.catalog import self_test
from pixart_rt.kernels.cross_attention import cross_attention
from pixart_rt.kernels.fp8_linear import (
    fp8_linear,
    fp8_linear_gelu,
    fp8_linear_residual,
    quantize_rows,
)
from pixart_rt.kernels.gate_residual import gate_residual_ln_modulate, gate_residual_ref
from pixart_rt.kernels.launch import SM80
from pixart_rt.kernels.linear import linear_gate_residual, linear_gelu, linear_residual
from pixart_rt.kernels.ln_modulate import ln_modulate, ln_modulate_fp8, ln_modulate_ref

Normed = Any  # what `norm` gives and `linear` takes: [B, N, D], or its fp8 values and row scales


class Rows(NamedTuple):
    """Where an operator's modulation comes from: table[row...] + shared[:, row...]."""

    table: Tensor  # [R, D]
    shared: Tensor  # [B, R, D] float32
    row: int


class Operators:
    """The reference set: plain PyTorch, one operator after the other."""

    def __init__(self, lossless: bool = False) -> None:
        self.lossless = lossless

    def prepare(self, blocks: nn.Module) -> None:
        """What the set needs of the weights, once. The reference needs nothing."""

    def ln_modulate(self, x: Tensor, rows: Rows) -> Tensor:
        """layer_norm(x)·(1 + scale) + shift; shift is rows.row, scale the next."""
        return ln_modulate_ref(x, *rows, self.lossless)

    def norm(self, x: Tensor, rows: Rows) -> Normed:
        """ln_modulate, in the form that this set's `linear` and `linear_gelu` take."""
        return self.ln_modulate(x, rows)

    def linear(self, y: Normed, layer: nn.Linear) -> Tensor:
        return layer(y)

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Tensor:
        return F.gelu(self.linear(y, layer), approximate="tanh")

    def self_attention(self, qkv: Tensor) -> Tensor:
        """Packed [B, N, 3, H, K] to [B, N, D]."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return _attend(q, k, v).transpose(1, 2).flatten(2)

    def cross_attention(self, q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
        """q [B, N, H, K] and kv [B, T, 2, H, K], where key_mask [B, T] is True, to [B, N, D]."""
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return _attend(q.transpose(1, 2), k, v, key_mask).transpose(1, 2).flatten(2)

    def linear_residual(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        """residual + gate·layer(x); without a gate, residual + layer(x)."""
        branch = self.linear(x, layer)
        return gate_residual_ref(residual, branch, *_gate(gate), self.lossless)

    def linear_residual_norm(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        """linear_residual, and `norm` of it."""
        x = self.linear_residual(x, layer, residual, gate)
        return x, self.norm(x, rows)

    def residual_norm(self, branch: Tensor, residual: Tensor, rows: Rows) -> tuple[Tensor, Normed]:
        """residual + branch, and `norm` of it."""
        x = gate_residual_ref(residual, branch, *_gate(None), self.lossless)
        return x, self.norm(x, rows)


class FusedOperators(Operators):
    """The operators of kernels/: forward and backward, eager, compiled and exported.

    Under autocast the residual stream stays float32 and the linears' inputs are cast, as
    nn.Linear's are; the residual is then added by the kernel that normalizes.

    What is not exactly an nn.Linear runs as the module it is, and the kernels do the rest: of a
    linear that carries an adapter (peft's LoRA) they would read the base weight alone.
    """

    def __init__(self, lossless: bool = False) -> None:
        super().__init__(lossless)
        self.gemm_epilogue = True  # gate and residual in the GEMM, from sm_80 on

    def prepare(self, blocks: nn.Module) -> None:
        """On a GPU, compare every kernel with its reference there first (kernels/catalog.py)."""
        parameter = next(blocks.parameters())
        if parameter.is_cuda:
            self_test(parameter.device, parameter.dtype)
            capability = torch.cuda.get_device_capability(parameter.device)
            self.gemm_epilogue = capability >= SM80

    def ln_modulate(self, x: Tensor, rows: Rows) -> Tensor:
        return ln_modulate(x, *rows, self.lossless)

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Tensor:
        if not is_plain(layer):
            return super().linear_gelu(y, layer)
        return linear_gelu(*_autocast(y, layer), self.lossless)

    def self_attention(self, qkv: Tensor) -> Tensor:
        return attention_qkv_packed(qkv)

    def cross_attention(self, q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
        return cross_attention(q, kv, key_mask)

    def linear_residual(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        if not is_plain(layer):
            return super().linear_residual(x, layer, residual, gate)
        x, weight, bias = _autocast(x, layer)
        if not self.gemm_epilogue or x.dtype != residual.dtype:
            branch = F.linear(x, weight, bias)
            return gate_residual_ref(residual, branch, *_gate(gate), self.lossless)
        if gate is None:
            return linear_residual(x, weight, bias, residual, self.lossless)
        return linear_gate_residual(x, weight, bias, *gate, residual, self.lossless)

    def linear_residual_norm(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        if is_plain(layer):
            x, weight, bias = _autocast(x, layer)
            if self.gemm_epilogue and x.dtype == residual.dtype:
                return super().linear_residual_norm(x, layer, residual, gate, rows)
            branch = F.linear(x, weight, bias)
        else:
            branch = self.linear(x, layer)
        return gate_residual_ln_modulate(residual, branch, *_gate(gate), *rows, self.lossless)

    def residual_norm(self, branch: Tensor, residual: Tensor, rows: Rows) -> tuple[Tensor, Normed]:
        if torch.compiler.is_exporting():  # ln_modulate may stay one node there, a plugin
            return super().residual_norm(branch, residual, rows)
        return gate_residual_ln_modulate(residual, branch, *_gate(None), *rows, self.lossless)


class WeightOnlyOperators(FusedOperators):
    """For linears whose weights torchao quantized: it runs their products, the kernels the rest."""

    def prepare(self, blocks: nn.Module) -> None:
        super().prepare(blocks)
        self.gemm_epilogue = False  # the epilogue's kernels read a plain weight

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Tensor:
        return F.gelu(self.linear(y, layer), approximate="tanh")


class Fp8Operators(FusedOperators):
    """The blocks' linears in fp8, but the text's keys and values; inference only.

    Weights have a scale for each output, activations one for each token, chosen as they are made.
    """

    def prepare(self, blocks: nn.Module) -> None:
        """Quantize the weights. Raises ConfigError for linears that carry adapters."""
        super().prepare(blocks)
        refuse_adapters(blocks, "fp8")
        for name, layer in blocks.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("kv_linear"):
                weight, scale = quantize_rows(layer.weight.detach())
                layer.register_buffer("weight_fp8", weight, persistent=False)
                layer.register_buffer("weight_scale", scale, persistent=False)

    def norm(self, x: Tensor, rows: Rows) -> Normed:
        return (*ln_modulate_fp8(x, *rows), x.dtype)

    def linear(self, y: Normed, layer: nn.Linear) -> Tensor:
        return fp8_linear(*_quantized(y, layer))

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Tensor:
        return fp8_linear_gelu(*_quantized(y, layer))

    def linear_residual(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        inputs = _quantized(x, layer)[:-1]
        return fp8_linear_residual(*inputs, *_gate(gate), residual)

    def linear_residual_norm(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        x = self.linear_residual(x, layer, residual, gate)
        return x, self.norm(x, rows)

    def residual_norm(self, branch: Tensor, residual: Tensor, rows: Rows) -> tuple[Tensor, Normed]:
        return Operators.residual_norm(self, branch, residual, rows)


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear is its weight and bias and nothing more, so that a kernel may read them."""
    return type(layer) is nn.Linear


def refuse_adapters(module: nn.Module, what: str) -> None:
    """ConfigError if a linear inside carries an adapter, which `what` would not see."""
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "base_layer", None), nn.Module):
            raise ConfigError(
                f"{what} was asked of a model whose {name} carries an adapter, which it would "
                "leave out; merge the adapter into the weights first"
            )


def _attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The reference, but for training in bfloat16 on a CPU; shapes as attention_ref's."""
    attend = attention_products if trains_by_products(q) else attention_ref
    return attend(q, k, v, key_mask)


def _gate(rows: Rows | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The gate's arguments as the operators take them; without rows the gate is 1."""
    return (None, None, 0) if rows is None else (rows.table, rows.shared, rows.row)


def _quantized(
    y: Normed, layer: nn.Linear
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """A linear's input and weight in fp8 with their scales, its bias, and the output's dtype."""
    x, scale, dtype = (*quantize_rows(y), y.dtype) if isinstance(y, Tensor) else y
    weight, weight_scale = layer.get_buffer("weight_fp8"), layer.get_buffer("weight_scale")
    return x, scale, weight, weight_scale, layer.bias, dtype


def _autocast(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """A linear's input, weight and bias in autocast's dtype, if autocast is on."""
    kind = "cuda" if x.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind):
        return x, layer.weight, layer.bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)


def operators(
    kernels: Kernels = Kernels.REFERENCE,
    quality: Quality = Quality.HIGH,
    weights: Weights = Weights.FULL,
) -> Operators:
    """The set of operators for a model. Raises ConfigError for fp8 without the kernels."""
    if quality is Quality.FAST and kernels is not Kernels.FUSED:
        raise ConfigError(
            f"quality {quality} was asked with {kernels} kernels, which have no fp8; use "
            f"{Kernels.FUSED} kernels or quality {Quality.HIGH}"
        )
    if quality is Quality.FAST:
        return Fp8Operators()
    if weights is not Weights.FULL and kernels is Kernels.FUSED:
        return WeightOnlyOperators(quality is Quality.LOSSLESS)
    lossless = quality is Quality.LOSSLESS
    return FusedOperators(lossless) if kernels is Kernels.FUSED else Operators(lossless)
