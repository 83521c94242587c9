"""Give an optimiser its learning rate for the next step."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Every parameter group gets this rate. A rate that is a tensor is filled, not replaced."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # what a CUDA graph or a compiled step reads
        else:
            group["lr"] = lr
