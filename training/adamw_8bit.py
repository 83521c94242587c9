"""AdamW with moments in 8 bits, by torchao (arXiv:2110.02861): 2 bytes a parameter instead of 8.

Blocks of 256 numbers share a scale; a parameter of fewer than 4096 numbers, or of a number that
256 does not divide, keeps float32 moments. torchao compiles the update, once for each shape.

Needs torchao, so import this file only where it is used (optimizers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchao.optim import AdamW8bit


class SkippingAdamW8bit(AdamW8bit):  # type: ignore[misc]  # torchao has no annotations
    """Honours `found_inf` (clipping.py): where it is 1 a step changes nothing.

    torchao's compiled update cannot decide that on the device, so the host reads `found_inf` and
    waits for the backward: the next step's first kernels are launched that much later. Fused AdamW
    and CAME do not wait.
    """

    _step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, or none at all."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return None
        return super().step(closure)
