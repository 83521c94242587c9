"""Gradient clipping that also finds steps which are not finite, without waiting for the device.

    norm, found_inf = clip_gradients(model.parameters(), 0.01)
    step_if_finite(optimizer, found_inf)
    skipped += found_inf                        a tensor; read it where the norm is logged

A NaN or an infinity in any gradient makes the norm so, and the norm decides for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pixart_rt.errors import ConfigError


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale all gradients so that their norm together is at most `max_norm`.

    Returns, on the gradients' device, the norm before [] and 1.0 where it was not finite, else 0.0
    []. As torch.nn.utils.clip_grad_norm_, with a sharded model's norm over all ranks. Raises
    ConfigError where no parameter has a gradient.
    """
    parameters = [each for each in parameters if each.grad is not None]
    gradients = [each.grad for each in parameters if each.grad is not None]
    if not gradients:
        raise ConfigError(
            "clipping was requested but no parameter has a gradient; run backward first"
        )
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm, (~torch.isfinite(norm)).to(torch.float32)


def step_if_finite(optimizer: Any, found_inf: Tensor) -> None:
    """optimizer.step(), which leaves weights and moments as they are where `found_inf` is 1.

    The optimiser decides on its device; fused AdamW and CAME (came.py) can. Others raise
    ConfigError: read `found_inf` and call step() yourself.
    """
    assert isinstance(optimizer, Optimizer)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ConfigError(
            f"{type(optimizer).__name__} cannot skip a step by itself; use AdamW(fused=True) or "
            "CAME, or step only if found_inf.item() is 0"
        )
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # GradScaler's way to say it
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
