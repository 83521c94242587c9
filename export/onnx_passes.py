"""Rewrites that a graph needs before it is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TwoStageGroupNorm(nn.Module):
    """GroupNorm with float32 statistics, summed along rows first and then over the rows.

    The exporter writes nn.GroupNorm as InstanceNormalization, whose ONNX Runtime kernel adds a
    group's millions of elements one after the other: the error of the tiny VAE's output grew
    with the image, to 5e-4 of its spread at 512 px (ONNX Runtime 1.31); so it is 2e-6. It would
    also leave float16's statistics to the engine.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...]; the result has its shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = x.to(wide).unflatten(1, (self.num_groups, -1))  # [B, G, C/G, ...]
        centered = groups - _mean(groups)
        normed = centered * torch.rsqrt(_mean(centered.square()) + self.eps)
        per_channel = (-1, *[1] * (x.dim() - 2))
        scale, shift = (p.to(wide).view(per_channel) for p in (self.weight, self.bias))
        return (normed.flatten(1, 2) * scale + shift).to(x.dtype)


def _mean(groups: Tensor) -> Tensor:
    """Mean over all but the first two axes, the last axis first."""
    for axis in range(groups.dim() - 1, 1, -1):
        groups = groups.mean(dim=axis, keepdim=True)
    return groups


@contextmanager
def two_stage_group_norms(module: nn.Module) -> Iterator[None]:
    """Inside the block every GroupNorm of `module` is a TwoStageGroupNorm."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.GroupNorm)
    ]
    for parent, name, child in found:
        setattr(parent, name, TwoStageGroupNorm(child))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
