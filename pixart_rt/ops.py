"""The seam between the model and its operators: the model calls these methods and no others.

`operators()` gives one set for all blocks. The reference is plain PyTorch; the fused set calls the
operators registered in kernels/, which run their Triton kernel where they can and their reference
where they cannot.

B images, N tokens, T text tokens, D width, H heads, K head width, R rows of a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt.config import Kernels, Quality
from pixart_rt.kernels.attention import attention_ref
from pixart_rt.kernels.gate_residual import gate_residual_ref
from pixart_rt.kernels.ln_modulate import ln_modulate_ref

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
        return attention_ref(q, k, v).transpose(1, 2).flatten(2)

    def cross_attention(self, q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
        """q [B, N, H, K] and kv [B, T, 2, H, K], where key_mask [B, T] is True, to [B, N, D]."""
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return attention_ref(q.transpose(1, 2), k, v, key_mask).transpose(1, 2).flatten(2)

    def linear_residual(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None
    ) -> Tensor:
        """residual + gate·layer(x); without a gate, residual + layer(x)."""
        branch = self.linear(x, layer)
        return gate_residual_ref(residual, branch, *(gate or (None, None, 0)), self.lossless)

    def linear_residual_norm(
        self, x: Tensor, layer: nn.Linear, residual: Tensor, gate: Rows | None, rows: Rows
    ) -> tuple[Tensor, Normed]:
        """linear_residual, and `norm` of it."""
        x = self.linear_residual(x, layer, residual, gate)
        return x, self.norm(x, rows)


def operators(kernels: Kernels = Kernels.REFERENCE, quality: Quality = Quality.HIGH) -> Operators:
    """The set of operators for a model. Raises ConfigError for fp8 without the kernels."""
    return Operators(lossless=quality is Quality.LOSSLESS)
