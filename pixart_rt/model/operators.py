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
from pixart_rt.kernels.catalog import FP8, MODEL, self_test
from pixart_rt.kernels.cross_attention import cross_attention
from pixart_rt.kernels.fp8_linear import (
    fp8_linear,
    fp8_linear_gelu_quantized,
    fp8_linear_residual,
    quantize_rows,
)
from pixart_rt.kernels.gate_residual import (
    gate_residual,
    gate_residual_ln_modulate,
    gate_residual_ref,
)
from pixart_rt.kernels.launch import SM80, choice, constant_result, exporting
from pixart_rt.kernels.linear import linear_gate_residual, linear_gelu, linear_residual
from pixart_rt.kernels.ln_modulate import ln_modulate, ln_modulate_fp8, ln_modulate_ref

EPILOGUE, CUBLAS = "epilogue", "cublas"  # forms of a linear with gate and residual
Normed = Any  # what `norm` gives and `linear` takes: [B, N, D], or its fp8 values and scales


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

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Normed:
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
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        """residual + gate·layer(x); without a gate, residual + layer(x)."""
        branch = self.linear(x, layer)
        return gate_residual_ref(residual, branch, *_gate(gate), self.lossless)

    def linear_residual_norm(
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
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

    Under autocast the residual stream stays float32 and the linears' inputs are in autocast's
    dtype: the kernels that normalize write it, and those that add to the residual read it.

    A linear with gate and residual has two forms, equal in launches where a LayerNorm follows: a
    GEMM with them in its epilogue ("epilogue"; ours, or the one that a table names for
    linear_gate_residual), or cuBLAS and one kernel for the rest ("cublas"). The GPU's table chooses
    by (tokens, inputs, outputs), for linear_residual_norm and linear_residual apart. Untimed, it is
    cuBLAS where a LayerNorm follows, for ours would have to reach 97 % of its speed to be the
    faster one (docs/kernels.md), and ours where none does.

    What is not exactly an nn.Linear runs as the module it is, and the kernels do the rest: of a
    linear that carries an adapter (peft's LoRA) they would read the base weight alone.
    """

    kernels = MODEL  # what `prepare` compares

    def __init__(self, lossless: bool = False) -> None:
        super().__init__(lossless)
        self.gemm_epilogue = True  # gate and residual in the GEMM can be, from sm_80 on

    def prepare(self, blocks: nn.Module) -> None:
        """On a GPU, compare every kernel with its reference there first (kernels/catalog.py)."""
        parameter = next(blocks.parameters())
        if parameter.is_cuda:
            trains = any(each.requires_grad for each in blocks.parameters())
            self_test(parameter.device, parameter.dtype, self.kernels, training=trains)
            capability = torch.cuda.get_device_capability(parameter.device)
            self.gemm_epilogue = capability >= SM80

    def ln_modulate(self, x: Tensor, rows: Rows) -> Tensor:
        return ln_modulate(x, *rows, self.lossless)

    def norm(self, x: Tensor, rows: Rows) -> Normed:
        return ln_modulate(x, *rows, self.lossless, _autocast_dtype(x))

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Normed:
        if not is_plain(layer):
            return super().linear_gelu(y, layer)
        return linear_gelu(*_autocast(y, layer), self.lossless)

    def self_attention(self, qkv: Tensor) -> Tensor:
        return attention_qkv_packed(qkv)

    def cross_attention(self, q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
        return cross_attention(q, kv, key_mask)

    def linear_residual(
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        if not self._epilogue("linear_residual", x, layer, EPILOGUE):
            branch = self._product(x, layer)
            return gate_residual(residual, branch, *_gate(gate), self.lossless)
        return self._gemm_residual(x, layer, residual, gate)

    def linear_residual_norm(
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        if exporting():  # as in residual_norm
            return super().linear_residual_norm(x, layer, residual, gate, rows)
        if self._epilogue("linear_residual_norm", x, layer, CUBLAS):
            x = self._gemm_residual(x, layer, residual, gate)
            return x, self.norm(x, rows)
        return self._sum_norm(self._product(x, layer), residual, gate, rows)

    def residual_norm(self, branch: Tensor, residual: Tensor, rows: Rows) -> tuple[Tensor, Normed]:
        if exporting():  # ln_modulate may stay one node there, a plugin
            return super().residual_norm(branch, residual, rows)
        return self._sum_norm(branch, residual, None, rows)

    def _sum_norm(
        self, branch: Tensor, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        """residual + gate·branch and `norm` of it, by one kernel."""
        return gate_residual_ln_modulate(
            residual, branch, *_gate(gate), *rows, self.lossless, _autocast_dtype(residual)
        )

    def _epilogue(self, op: str, x: Tensor, layer: nn.Linear, default: str) -> bool:
        """Whether gate and residual are part of this linear's GEMM."""
        if not (self.gemm_epilogue and is_plain(layer)):
            return False
        return implementation(op, x, layer.out_features, default) == EPILOGUE

    def _product(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(*_autocast(x, layer)) if is_plain(layer) else self.linear(x, layer)

    def _gemm_residual(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        x, weight, bias = _autocast(x, layer)
        if gate is None:
            return linear_residual(x, weight, bias, residual, self.lossless)
        return linear_gate_residual(x, weight, bias, *gate, residual, self.lossless)


class WeightOnlyOperators(FusedOperators):
    """For linears whose weights torchao quantized: it runs their products, the kernels the rest."""

    def prepare(self, blocks: nn.Module) -> None:
        super().prepare(blocks)
        self.gemm_epilogue = False  # the epilogue's kernels read a plain weight

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Normed:
        return F.gelu(self.linear(y, layer), approximate="tanh")


class Fp8Operators(FusedOperators):
    """The blocks' linears in fp8, but the text's keys and values; inference only.

    Weights have a scale for each output, activations one for each token, chosen as they are made;
    what GELU makes has one for each token and 128 channels, for no tile sees a token's all.
    """

    kernels = (*MODEL, *FP8)

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

    def linear_gelu(self, y: Normed, layer: nn.Linear) -> Normed:
        *inputs, dtype = _quantized(y, layer)
        return (*fp8_linear_gelu_quantized(*inputs), dtype)

    def linear_residual(
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        inputs = _quantized(x, layer)[:-1]
        return fp8_linear_residual(*inputs, *_gate(gate), residual)

    def linear_residual_norm(
        self, x: Normed, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
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
                f"{what} was requested of a model whose {name} carries an adapter, which it would "
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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast's linears take, on x's device; None if autocast is off."""
    kind = "cuda" if x.is_cuda else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _autocast(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """A linear's input, weight and bias in autocast's dtype, if autocast is on."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, layer.weight, layer.bias
    return x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)


def implementation(op: str, x: Tensor, out: int, default: str) -> str:
    """Which form a linear of x [B, N, I] with gate and residual has: EPILOGUE or CUBLAS.

    While a model is traced with any number of tokens it is `default`: a choice by their number
    would make one program for every number.
    """
    shape = (x.shape[0] * x.shape[1], x.shape[2], out)
    if not torch.compiler.is_compiling():
        return choice(op, x, shape, default)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # sympy: half a second

    if not has_static_value(shape[0]):
        return default
    return _traced_choice(op, x.device, x.dtype, shape, default)


@constant_result
def _traced_choice(
    op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], default: str
) -> str:
    """`choice` for a tracer, which shall not look at files."""
    like = torch.empty(0, dtype=dtype, device=device)
    return choice(op, like, shape, default)


def operators(
    kernels: Kernels = Kernels.REFERENCE,
    quality: Quality = Quality.HIGH,
    weights: Weights = Weights.FULL,
) -> Operators:
    """The set of operators for a model. Raises ConfigError for fp8 without the kernels."""
    if quality is Quality.FAST and kernels is not Kernels.FUSED:
        raise ConfigError(
            f"quality {quality} is not supported with {kernels} kernels, which have no fp8; use "
            f"{Kernels.FUSED} kernels or quality {Quality.HIGH}"
        )
    if quality is Quality.FAST:
        return Fp8Operators()
    if weights is not Weights.FULL and kernels is Kernels.FUSED:
        return WeightOnlyOperators(quality is Quality.LOSSLESS)
    lossless = quality is Quality.LOSSLESS
    return FusedOperators(lossless) if kernels is Kernels.FUSED else Operators(lossless)
