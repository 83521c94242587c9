"""All operators of this folder, and a self-test of their kernels on the GPU at hand."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from pixart_rt.kernels.launch import (
    SM89,
    Operator,
    capability,
    forcing,
    gpu_name,
    interpreting,
    record,
    refuse,
)

FILES = (
    ln_modulate, gate_residual, attention, cross_attention, linear, fp8_linear, solver,
    group_norm_silu,
)  # fmt: skip
OPERATORS: tuple[Operator, ...] = tuple(each for file in FILES for each in file.OPERATORS)

VAE = ("group_norm_silu",)
FP8 = tuple(each.name for each in OPERATORS if each.least == SM89)
MODEL = tuple(each.name for each in OPERATORS if each.name not in (*VAE, *FP8))

# Largest relative error between kernel and reference, both rounding their inputs and outputs.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.float8_e4m3fn: 4e-2,  # half a step of 3 bits
}
# Rows of a step and tokens of an image that a model meets: 256, 512 and 1024 px, one image without
# and with guidance, and sixteen with it. Tables have entries near these.
PRODUCTION = tuple(itertools.product((1, 2, 32), (256, 1024, 4096)))
INTERPRETED_FP8 = 1e-1  # Triton's interpreter truncates to fp8 where a GPU rounds


def flat(outputs: Any) -> list[Tensor]:
    """The tensors that an operator returned."""
    return [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t.numel()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN where either has one."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def worst_error(
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    inputs: tuple[Any, ...] | None = None,
    training: bool = True,
) -> float:
    """The largest relative error of an operator's outputs, in units of its tolerance.

    Of `inputs`, by default its example. In `training`, if it has gradients, also of the training
    form of the forward and of the backward.
    """
    if inputs is None:
        inputs = operator.example(device, dtype, seed)
    with torch.no_grad():
        pairs = list(
            zip(flat(operator.run(*inputs)), flat(operator.reference(*inputs)), strict=True)
        )
    if operator.trains and training:
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


def production_configurations(
    device: torch.device, dtype: torch.dtype
) -> dict[str, list[dict[str, int]]]:
    """What the shapes of PRODUCTION select on this GPU: table name -> distinct configurations."""
    like = torch.empty(0, device=device)
    found: dict[str, list[dict[str, int]]] = {}
    with record(capability(like), gpu_name(like)) as recorded, torch.device("meta"):
        for file, (rows, tokens) in itertools.product(FILES, PRODUCTION):
            file.compile_example(dtype, rows, tokens)
    for op, configurations in recorded.configurations.items():
        found[op] = configurations
    return found


def _rounds(
    operator: Operator, configurations: dict[str, list[dict[str, int]]]
) -> Iterator[dict[str, dict[str, int]]]:
    """Sets of configurations, one a table, that together contain each of them at least once."""
    mine = {
        table: configurations[table]
        for table in operator.tables or (operator.name,)
        if table in configurations
    }
    for k in range(max(map(len, mine.values()), default=1)):
        yield {table: each[min(k, len(each) - 1)] for table, each in mine.items()}


def _check(
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    configurations: dict[str, list[dict[str, int]]],
) -> str:
    """Why the operator's kernel cannot be used here; "" if it agrees with its reference.

    The awkward example runs with the first set of configurations, the inputs of production widths
    with every set: what a request will launch, but for the number of tokens.
    """
    for k, chosen in enumerate(_rounds(operator, configurations)):
        inputs = [*operator.production(device, dtype, 0)]
        if k == 0:
            inputs.append(operator.example(device, dtype, 0))
        with ExitStack() as stack:
            for table, configuration in chosen.items():
                stack.enter_context(forcing(table, configuration))
            for each in inputs:
                try:
                    error = worst_error(operator, device, dtype, 0, inputs=each, training=training)
                except Exception as exception:  # whatever a compiler or driver raises
                    first = (str(exception).splitlines() or [""])[0]
                    return f"{type(exception).__name__}: {first}{_with(chosen)}"
                if not error <= 1:
                    return f"its error is {error:.3g} times the tolerance{_with(chosen)}"
    return ""


def _with(chosen: dict[str, dict[str, int]]) -> str:
    said = "; ".join(
        f"{table}: " + ", ".join(f"{key}={value}" for key, value in configuration.items())
        for table, configuration in chosen.items()
    )
    return f" ({said})" if said else ""


@functools.cache
def self_test(
    device: torch.device,
    dtype: torch.dtype,
    names: tuple[str, ...] = MODEL,
    *,
    training: bool = False,
) -> tuple[str, ...]:
    """Compare the named operators' kernels on this GPU with their references, once a process.

    With the tiles, warps, descriptors and inner sizes that production shapes select, and in
    `training` with the backward kernels, which are not compiled otherwise.
    Where a kernel differs, does not compile or does not fit the GPU, its reference runs in this
    dtype from now on and a warning says so. Returns the names of those operators.
    """
    failed = []
    here = capability(torch.empty(0, device=device))
    # Outside inference mode: its tensors cannot require gradients, and a pipeline loads inside it.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        configurations = production_configurations(device, dtype)
        for operator in OPERATORS:
            wanted = dtype in operator.dtypes and operator.name in names
            if here < operator.least or not wanted:
                continue
            reason = _check(operator, device, dtype, training, configurations)
            if reason:
                refuse(operator.name, device, dtype, reason)
                failed.append(operator.name)
                warnings.warn(
                    f"the kernel {operator.name} is not used on "
                    f"{torch.cuda.get_device_name(device)} in {str(dtype).removeprefix('torch.')}: "
                    f"{reason}; PyTorch's operators run instead",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return tuple(failed)
