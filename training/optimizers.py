"""The optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from pixart_rt.training.came import CAME
from pixart_rt.training.run_settings import OptimizerKind


def make_optimizer(
    kind: OptimizerKind,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Optimizer:
    if kind is OptimizerKind.CAME:
        return CAME(parameters, lr, weight_decay=weight_decay)
    return torch.optim.AdamW(
        parameters, lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
