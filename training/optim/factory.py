"""The optimisers by name: fused AdamW, AdamW with 8-bit moments, CAME, Muon.

All take steps through clipping.step_if_finite: one that is not finite changes neither weights nor
state. Rates are changed by lr.set_lr. Bytes of state a parameter: 8, about 2, about 4, about 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.torchao_import import quiet_imports
from pixart_rt.training.optim.came import CAME
from pixart_rt.training.optim.muon import Muon
from pixart_rt.training.run_settings import OptimizerKind

_BETAS: dict[OptimizerKind, tuple[float, ...]] = {
    OptimizerKind.ADAMW: (0.9, 0.999),
    OptimizerKind.ADAMW_8BIT: (0.9, 0.999),
    OptimizerKind.CAME: (0.9, 0.999, 0.9999),
    OptimizerKind.MUON: (0.9, 0.999),  # of what AdamW moves
}
_EPS: dict[OptimizerKind, tuple[float, ...]] = {
    OptimizerKind.ADAMW: (1e-8,),
    OptimizerKind.ADAMW_8BIT: (1e-8,),
    OptimizerKind.CAME: (1e-30, 1e-16),
    OptimizerKind.MUON: (1e-8,),
}


def make_optimizer(
    kind: OptimizerKind,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    weight_decay: float,
    betas: Sequence[float] | None = None,
    eps: float | Sequence[float] | None = None,
    products: torch.dtype | None = None,
) -> Optimizer:
    """An optimiser of parameters or parameter groups. None is the kind's own default.

    `products` is the dtype that Muon multiplies in (muon.py); the others do not multiply.
    CAME takes three betas and two eps, the others two and one. Raises ConfigError for another
    number of them or values out of range, BackendError where 8-bit AdamW is asked without torchao.
    """
    betas = _checked(kind, "betas", _BETAS[kind] if betas is None else betas, len(_BETAS[kind]))
    given = _EPS[kind] if eps is None else (eps,) if isinstance(eps, int | float) else eps
    eps = _checked(kind, "eps", given, len(_EPS[kind]))
    if not (lr >= 0 and weight_decay >= 0 and min(eps) >= 0 and 0 <= min(betas) <= max(betas) < 1):
        raise ConfigError(
            f"{kind} got lr {lr}, weight_decay {weight_decay}, betas {betas}, eps {eps}; betas lie "
            "in [0, 1), and nothing is negative"
        )
    if kind is OptimizerKind.CAME:
        came_betas, came_eps = (betas[0], betas[1], betas[2]), (eps[0], eps[1])
        return CAME(parameters, lr, came_betas, came_eps, weight_decay=weight_decay)
    if kind is OptimizerKind.MUON:
        return Muon(parameters, lr, (betas[0], betas[1]), eps[0], weight_decay, products=products)
    settings: dict[str, Any] = {
        "lr": lr, "betas": betas, "eps": eps[0], "weight_decay": weight_decay
    }  # fmt: skip
    if kind is OptimizerKind.ADAMW:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        with quiet_imports():
            from pixart_rt.training.optim.adamw8bit import SkippingAdamW8bit
    except ImportError as error:
        raise BackendError(
            f"optimizer {kind} was requested, but torchao cannot be imported ({error}); "
            "pip install 'pixart_rt[quant]', or choose adamw or came"
        ) from error
    return SkippingAdamW8bit(parameters, **settings)


def _checked(
    kind: OptimizerKind, name: str, values: Sequence[float], count: int
) -> tuple[float, ...]:
    if len(values) != count:
        raise ConfigError(f"{kind} takes {count} {name}, got {tuple(values)}")
    return tuple(values)
