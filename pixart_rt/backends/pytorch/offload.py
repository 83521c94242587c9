"""A PyTorch component whose weights stay in host memory and are on the GPU only while it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Offloaded:
    """Copies the weights to `device`, runs the module there, and drops them.

    The host's own stay where they are, so nothing is ever copied back. On a GPU they are pinned,
    which lets the copies run at the bus's speed and without waiting; quantized ones are not.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        if device.type == "cuda":
            for parameter in module.parameters():
                if type(parameter) is nn.Parameter:
                    parameter.data = parameter.data.pin_memory()
        self._module, self._device = module, device

    def __call__(self, **inputs: Tensor) -> Tensor:
        state = {
            name: self._brought(tensor)
            for tensors in (self._module.named_parameters(), self._module.named_buffers())
            for name, tensor in tensors
        }
        output: Tensor = functional_call(self._module, state, kwargs=inputs)
        return output

    def _brought(self, tensor: Tensor) -> Tensor:
        if type(tensor) in (Tensor, nn.Parameter):
            return tensor.to(self._device, non_blocking=True)
        return tensor.to(self._device)  # torchao's tensors refuse non_blocking
