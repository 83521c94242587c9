"""The factor that keeps float16 gradients from vanishing; on the device, read by nobody.

As torch.amp.GradScaler (Micikevicius et al., arXiv:1710.03740, Section 3.2): halved after a step
that was not finite, doubled after GROWTH_INTERVAL steps that were. It takes the verdict of
clip_gradients, which has seen the gradients of all ranks, so that sharded models need no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

START, GROWTH, BACKOFF, GROWTH_INTERVAL = 65536.0, 2.0, 0.5, 2000


class LossScale:
    """`enabled` false, as for float32 and bfloat16: the factor is 1 and stays so."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(START if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call backward on."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the factor."""
        if not self.enabled:
            return
        found = [each.grad for each in parameters if each.grad is not None]
        gradients = [each.to_local() if isinstance(each, DTensor) else each for each in found]
        torch._foreach_mul_(gradients, 1 / self.scale)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """After a step; found_inf [] is 1.0 where it was not finite."""
        if not self.enabled:
            return
        bad = found_inf > 0
        good = torch.where(bad, 0, self.good_steps + 1)
        grow = good >= GROWTH_INTERVAL
        factor = torch.where(bad, BACKOFF, torch.where(grow, GROWTH, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(grow, 0, good))

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])
