"""Softmax attention by matrix products, for training in bfloat16 on a CPU: softmax(q·kᵀ/√K)·v.

B images, H heads, N queries, T keys, K lanes a head. PyTorch's attention on CPUs is a tiled kernel;
the products that it is made of run faster where the processor multiplies bfloat16
(`python -m benchmarks.attention_products`). Plain PyTorch, which differentiates it.

At most SCORES scores exist at once. More are formed for a part of the queries after the other, and
again in the backward (activation checkpointing); what they add to the gradients of keys and values
is summed in float32. Scores and weights are rounded to q's dtype between the products; softmax
itself is computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = 1 << 22  # formed at once; 8 MiB in bfloat16


def attention_products(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """As attention.py's attention_ref: q [B, H, N, K], k and v [B, H, T, K] to [B, H, N, K].

    key_mask is [B, T] boolean, True where a key may be seen; every row needs one.
    """
    B, H, N, _ = q.shape
    T = k.shape[2]
    bias = q.new_zeros(())
    if key_mask is not None:
        bias = q.new_zeros(B, T).masked_fill(~key_mask, -math.inf)[:, None].repeat_interleave(H, 0)
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    rows = max(1, SCORES // (B * H * T))
    if rows >= N:
        return _attend(q, k, v, bias).unflatten(0, (B, H))
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)  # each part rounds them back, so their gradients add up wide
    parts = [
        checkpoint(_attend, part, k, v, bias, use_reentrant=False) for part in q.split(rows, 1)
    ]
    return torch.cat(parts, 1).unflatten(0, (B, H))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """In q's dtype; q, k and v [B·H, tokens, K], bias [B·H, 1, T] or one number."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = torch.baddbmm(bias, q, k.mT, alpha=1 / math.sqrt(q.shape[-1]))
    return torch.bmm(scores.softmax(-1), v)


def trains_by_products(q: Tensor) -> bool:
    """Whether `attention_products` is the faster one for q: bfloat16 on a CPU, differentiated.

    Never for a compiler or an exporter: parts of queries would depend on how many there are.
    """
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and q.requires_grad
        and not torch.compiler.is_compiling()
    )
