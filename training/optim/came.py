"""CAME: Confidence-guided Adaptive Memory Efficient Optimization (arXiv:2307.02047, Algorithm 2).

For a matrix of n rows and m columns, with gradient g, all sums running averages:

    r, c  <- mean of g^2 + eps1 over columns, over rows            beta2
    v      = r c / mean(r)                                         the second moment, rank one
    u      = g / sqrt(v),  divided by max(1, RMS(u) / d)
    m     <- u                                                     beta1
    R, C  <- mean of (u - m)^2 + eps2 over columns, over rows      beta3
    s      = R C / mean(R)                                         the instability of u
    w     <- w - lr (m / sqrt(s) + weight_decay w)

The paper's sums are means here, which gives the same v and s. A vector or scalar has v in full and,
as in the authors' code, no s: w <- w - lr m. A tensor of more dimensions is a stack of matrices.
Memory: one moment and n + m numbers twice, in place of Adam's two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pixart_rt.errors import ConfigError


class CAME(Optimizer):
    """The defaults are those of the paper; PixArt-Sigma trains with lr 2e-5 and no weight decay.

    Moments are float32 whatever the weights are. Honours `found_inf` (clipping.py): where it is 1 a
    step changes nothing.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,  # d
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 3:
            raise ConfigError(f"CAME takes three betas in [0, 1), got {betas}")
        if not (float(lr) >= 0 and clip_threshold > 0 and weight_decay >= 0 and min(eps) >= 0):
            raise ConfigError(
                f"CAME got lr {lr}, clip_threshold {clip_threshold}, weight_decay {weight_decay}, "
                f"eps {eps}; none may be negative, clip_threshold not 0"
            )
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, found_inf)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_start(parameter))
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        new = _averaged(state, "square", gradient.square() + eps1, beta2)
        update = gradient * _inverse_root(new, "square")
        rms = update.square().mean().sqrt()
        update = update / (rms / group["clip_threshold"]).clamp(min=1.0)
        new["moment"] = beta1 * state["moment"] + (1 - beta1) * update
        direction = new["moment"]
        if parameter.dim() > 1:
            instability = (update - direction).square() + eps2
            new |= _averaged(state, "residual", instability, beta3)
            direction = direction * _inverse_root(new, "residual")
        weight = parameter.float()
        weight = weight - group["lr"] * (direction + group["weight_decay"] * weight)
        for old, value in ((parameter, weight), *((state[name], new[name]) for name in new)):
            old.copy_(value if found_inf is None else torch.where(found_inf > 0, old, value))


def _start(parameter: Tensor) -> dict[str, Tensor]:
    """Zeros: a moment, and the averages in factors or, of a vector, in full."""
    moment = torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.dim() < 2:
        return {"moment": moment, "square": torch.zeros_like(moment)}
    return {
        "moment": moment,
        **{
            f"{name}_{axis}": torch.zeros_like(moment.select(drop, 0))
            for name in ("square", "residual")
            for axis, drop in (("row", -1), ("column", -2))
        },
    }


def _averaged(state: dict[str, Tensor], name: str, value: Tensor, beta: float) -> dict[str, Tensor]:
    """The running average of `value`: of its means over columns and rows, or in full."""
    if name in state:
        return {name: beta * state[name] + (1 - beta) * value}
    means = {f"{name}_row": value.mean(-1), f"{name}_column": value.mean(-2)}
    return {key: beta * state[key] + (1 - beta) * mean for key, mean in means.items()}


def _inverse_root(new: dict[str, Tensor], name: str) -> Tensor:
    """1 / sqrt of an average; of its factors, row column / mean(row)."""
    if name in new:
        return new[name].rsqrt()
    row, column = new[f"{name}_row"], new[f"{name}_column"]
    scaled = row / row.mean(-1, keepdim=True)  # first, as the product may leave float32
    return scaled.rsqrt()[..., :, None] * column.rsqrt()[..., None, :]
