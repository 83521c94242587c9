"""The moving average of a model's weights: a <- decay a + (1 - decay) w, in float32.

One foreach call for all parameters. The average may live on the CPU, which saves 4 bytes a
parameter on the device (2.4 GB for XL/2) and costs a copy of the weights in each update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.model.transformer import local


class Ema:
    """Averages of what trains in `model`, parameters by name; they start as the parameters are.

    `device` is where they are kept, by default next to each parameter.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, device: torch.device | str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the EMA's decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._parameters = {
            name: each.detach() for name, each in model.named_parameters() if each.requires_grad
        }
        self.averages = {
            name: each.to(each.device if device is None else device, torch.float32, copy=True)
            for name, each in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Move every average towards its parameter. Waits for the device only to copy to the CPU.

        A bfloat16 parameter is widened first: the average of roundings is not their rounding.
        found_inf: 1 for a step that was skipped, which moves nothing; the host does not wait to
            know. A run with skipped steps has the averages of the run without them.
        """
        averages = list(self.averages.values())
        values = [
            each.to(average.device, torch.float32)
            for each, average in zip(self._parameters.values(), averages, strict=True)
        ]
        if found_inf is None:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        elif averages:
            share = (1 - self.decay) * (1 - found_inf.to(averages[0].device, torch.float32))
            mine = [local(each) for each in averages]
            torch._foreach_lerp_(mine, [local(each) for each in values], [share] * len(mine))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the averages to a model of the same names, in its own dtype."""
        for name, parameter in self._averaged(model):
            parameter.copy_(self.averages[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let `model` be the average inside the block, for validation images; then itself again."""
        mine = [parameter.detach() for _, parameter in self._averaged(model)]
        kept = [each.clone() for each in mine]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(mine, kept)

    def _averaged(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [each for each in model.named_parameters() if each[0] in self.averages]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names: what a checkpoint of the EMA weights holds."""
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages. Raises CheckpointError where they are another model's."""
        strange = sorted(set(state) ^ set(self.averages))
        strange += [
            name
            for name, average in self.averages.items()
            if name in state and state[name].shape != average.shape
        ]
        if strange:
            raise CheckpointError(
                f"the saved EMA does not fit the model: {strange[0]} is missing, unknown or of "
                "another shape; resume with the configuration it was saved with"
            )
        for name, average in self.averages.items():
            average.copy_(state[name])
