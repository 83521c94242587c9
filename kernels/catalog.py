"""All operators of this folder, and a self-test of their kernels on the GPU at hand."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels import (
    attention,
    cross_attention,
    fp8_linear,
    gate_residual,
    group_norm_silu,
    linear,
    ln_modulate,
    solver,
)
from pixart_rt.kernels.launch import Operator, capability, interpreting, refuse

FILES = (
    ln_modulate, gate_residual, attention, cross_attention, linear, fp8_linear, solver,
    group_norm_silu,
)  # fmt: skip
OPERATORS: tuple[Operator, ...] = tuple(each for file in FILES for each in file.OPERATORS)

# Largest relative error between kernel and reference, both rounding their inputs and outputs.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.float8_e4m3fn: 4e-2,  # half a step of 3 bits
}
INTERPRETED_FP8 = 1e-1  # Triton's interpreter truncates to fp8 where a GPU rounds


def flat(outputs: Any) -> list[Tensor]:
    """The tensors that an operator returned."""
    return [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t.numel()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN where either has one."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def worst_error(operator: Operator, device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """The largest relative error of an operator's outputs, in units of its tolerance.

    With gradients, if it has them: the training form of the forward, and the backward.
    """
    inputs = operator.example(device, dtype, seed)
    with torch.no_grad():
        pairs = list(
            zip(flat(operator.run(*inputs)), flat(operator.reference(*inputs)), strict=True)
        )
    if operator.trains:
        with torch.enable_grad():
            actual, expected = _train(operator.run, inputs), _train(operator.reference, inputs)
        pairs += zip(actual, expected, strict=True)
    errors = []
    for one, other in pairs:
        allowed = max(TOLERANCE[dtype], TOLERANCE[one.dtype])
        if one.dtype == torch.float8_e4m3fn and interpreting():
            allowed = INTERPRETED_FP8
        errors.append(relative_error(one, other) / allowed)
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _train(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, and gradients of every floating-point input for the same gradient of the outputs."""
    leaves = [
        each.detach().requires_grad_()
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in inputs
    ]
    outputs = flat(function(*leaves))
    seeds = [
        torch.linspace(-1, 1, each.numel(), device=each.device).view(each.shape).to(each.dtype)
        for each in outputs
    ]
    wanted = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, seeds)]


@functools.cache
def self_test(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Compare every kernel that would run on this GPU with its reference, once a process.

    Where they differ, or the kernel does not compile, the reference runs from now on and a warning
    says so. Returns the names of those operators.
    """
    failed = []
    here = capability(torch.empty(0, device=device))
    for operator in OPERATORS:
        if here < operator.least or dtype not in operator.dtypes:
            continue
        try:
            error = worst_error(operator, device, dtype, seed=0)
            reason = "" if error <= 1 else f"its error is {error:.3g} times the tolerance"
        except Exception as exception:  # whatever a compiler or driver raises: run the reference
            first = (str(exception).splitlines() or [""])[0]
            reason = f"{type(exception).__name__}: {first}"
        if reason:
            refuse(operator.name, device, reason)
            failed.append(operator.name)
            warnings.warn(
                f"the kernel {operator.name} is not used on {torch.cuda.get_device_name(device)}: "
                f"{reason}; PyTorch's operators run instead",
                RuntimeWarning,
                stacklevel=2,
            )
    return tuple(failed)
