"""AdamW with moments in 8 bits, by torchao (arXiv:2110.02861): 2 bytes a parameter instead of 8.

Blocks of 256 numbers share a scale; a parameter of fewer than 4096 numbers, or of a number that
256 does not divide, keeps float32 moments. torchao compiles the update, once for each shape.

Needs torchao, so import this file only where it is used (optimizers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from pixart_rt.errors import ConfigError

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # a moment, and whether it may be negative
CODES, SCALE = "_codes", "_scale"  # what a saved moment's name ends in


class SkippingAdamW8bit(AdamW8bit):  # type: ignore[misc]  # torchao has no annotations
    """Honours `found_inf` (clipping.py): where it is 1 a step changes nothing.

    torchao's compiled update cannot decide that on the device, so the host reads `found_inf` and
    waits for the backward: the next step's first kernels are launched that much later. Fused AdamW
    and CAME do not wait.

    state_dict() has plain tensors: for a moment in 8 bits its codes, uint8 in the parameter's
    shape, and its scales, one for each block. Asynchronous distributed checkpoints cannot take
    torchao's own tensors. Parameters that FSDP divides are refused: their blocks lie differently
    with every number of ranks, and could not be loaded by another.
    """

    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError for a parameter that is divided over ranks."""
        super().add_param_group(param_group)
        if any(isinstance(each, DTensor) for each in self.param_groups[-1]["params"]):
            raise ConfigError(
                "adamw8bit is not supported for parameters that are divided over ranks (FSDP); use "
                "DDP, or adamw or came"
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, or none at all."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return None
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """As an Optimizer's, with plain tensors."""
        saved = super().state_dict()
        saved["state"] = {key: _plain(state) for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        states = {key: _packed(state) for key, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": states})


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, OptimState8bit):
            found |= {name + CODES: value.codes, name + SCALE: value.scale}
        else:
            found[name] = value
    return found


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    found = {name: each for name, each in state.items() if not name.endswith((CODES, SCALE))}
    for name, signed in SIGNED.items():
        if name + CODES in state:
            found[name] = _moment(state[name + CODES], state[name + SCALE], signed)
    return found


def _moment(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """A tensor of torchao's with copies of these codes and scales."""
    block = codes.numel() // scale.numel()
    made = OptimState8bit.zeros(codes.shape, signed, block, codes.device, dtype=torch.float32)
    made.codes.copy_(codes)
    made.scale.copy_(scale)
    return made
