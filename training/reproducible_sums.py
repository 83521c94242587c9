"""Sums of gradients in a fixed order: the same bits whatever the number of ranks.

    g = ((g_0 + g_1) + (g_2 + g_3)) + ...        a binary tree over the micro-batches of a step

A rank adds its own micro-batches, which are a subtree, and the ranks' sums are the rest of it. Each
micro-batch is computed alone, with the same shapes on any number of ranks. The number of ranks and
of micro-batches are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TreeSum:
    """Adds lists of tensors as they come, in a binary tree."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, list[Tensor]]] = []  # (height, sum), highest first

    def add(self, tensors: list[Tensor]) -> None:
        """One more leaf; its tensors are kept, and overwritten."""
        height = 0
        while self._waiting and self._waiting[-1][0] == height:
            _, left = self._waiting.pop()
            torch._foreach_add_(left, tensors)
            tensors, height = left, height + 1
        self._waiting.append((height, tensors))

    def result(self) -> list[Tensor]:
        """The sum, of a number of leaves that is a power of two."""
        assert len(self._waiting) == 1, "the leaves do not fill a tree"
        return self._waiting.pop()[1]


@torch.no_grad()
def take_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients, zero where there is none, taken from the parameters."""
    taken = []
    for each in parameters:
        taken.append(torch.zeros_like(each) if each.grad is None else each.grad)
        each.grad = None
    return taken


@torch.no_grad()
def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Every rank's tensors added in a tree, rank by rank; the same on all of them."""
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        return tensors
    tree = TreeSum()
    flat = torch.cat([each.flatten() for each in tensors])
    gathered = [torch.empty_like(flat) for _ in range(num_ranks)]
    dist.all_gather(gathered, flat)
    for each in gathered:
        tree.add([each])
    (total,) = tree.result()
    parts = total.split([each.numel() for each in tensors])
    return [part.view_as(each) for part, each in zip(parts, tensors, strict=True)]
