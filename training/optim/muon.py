"""Muon: matrices move by the orthogonalized average of their gradients (Jordan et al., 2024).

    m <- mu m + (1 - mu) g,    u = (1 - mu) g + mu m                Nesterov's, mu 0.95
    o  = U V^T of u = U S V^T, roughly                              Newton-Schulz, five steps
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) o

The last factor gives a step AdamW's size (arXiv:2502.16982, Section 2.2), so that both share one
rate. What is no matrix, or is in a group with "muon": False, moves by AdamW. On few small steps the
matrices of a transformer's blocks learn faster so; the paper trains with AdamW.

Equal shapes are orthogonalized together: the blocks of a transformer repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from pixart_rt.errors import ConfigError

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x (a + b x x^T + c (x x^T)^2), steepest at zero
STEPS = 5
TINY = 1e-7  # below it a norm counts as this


class Muon(Optimizer):
    """Honours `found_inf` (clipping.py): where it is 1 a step changes nothing.

    Moments are in the parameters' dtype. Parameters that FSDP divides are refused: a part of a
    matrix has other singular vectors. `products` is that of `orthogonalized`.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        products: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "momentum": momentum, "products": products, "muon": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError for a parameter that is divided over ranks."""
        super().add_param_group(param_group)
        if any(isinstance(each, DTensor) for each in self.param_groups[-1]["params"]):
            raise ConfigError(
                "muon is not supported for parameters that are divided over ranks (FSDP); use DDP, "
                "or adamw or came"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            found = [each for each in group["params"] if each.grad is not None]
            by_shape: dict[torch.Size, list[Tensor]] = {}
            others = []
            for parameter in found:
                if group["muon"] and parameter.dim() == 2:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                else:
                    others.append(parameter)
            for matrices in by_shape.values():
                self._turn(matrices, group, found_inf)
            if others:
                self._adamw(others, group, found_inf)
        return loss

    def _turn(
        self, matrices: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Muon's step of matrices of one shape."""
        for parameter in matrices:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        keep = group["momentum"]
        old = torch.stack([self.state[each]["momentum"] for each in matrices])
        gradient = torch.stack([each.grad for each in matrices if each.grad is not None])
        average = old.lerp(gradient, 1 - keep)
        direction = orthogonalized(gradient.lerp(average, keep), group["products"])
        size = 0.2 * max(matrices[0].shape) ** 0.5
        weight = torch.stack(matrices)
        moved = weight * (1 - group["lr"] * group["weight_decay"])
        moved = moved - group["lr"] * size * direction.to(weight.dtype)
        if found_inf is not None:
            average = torch.where(found_inf > 0, old, average)
            moved = torch.where(found_inf > 0, weight, moved)
        torch._foreach_copy_(matrices, list(moved))
        torch._foreach_copy_([self.state[each]["momentum"] for each in matrices], list(average))

    def _adamw(
        self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """PyTorch's fused step, which decides on its device whether to be skipped."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[each] for each in parameters]
        adamw(
            parameters,
            [each.grad for each in parameters if each.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: Tensor, products: torch.dtype | None = None) -> Tensor:
    """[M, rows, columns] to matrices of singular values near 1 (0.5 to 1.5) and the same vectors.

    `products` is the dtype to multiply in; None is bfloat16 on a GPU, where that is fast, and
    float32 elsewhere.
    """
    dtype = products or (torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_groups(module: nn.Module, units: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Two parameter groups of what trains in `module`: the matrices of `units`, and the rest.

    Tables of modulation are no matrices in this sense: nothing is multiplied by them.
    """
    inside = {
        id(parameter)
        for unit in units
        for name, parameter in unit.named_parameters()
        if parameter.dim() == 2 and not name.endswith("table")
    }
    trained = [each for each in module.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in trained if (id(each) in inside) is chosen], "muon": chosen}
        for chosen in (True, False)
    ]
    return [group for group in groups if group["params"]]
