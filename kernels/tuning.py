"""Measure launch configurations on the GPU at hand and write the table that `launch.config` reads.

A subject is one entry of the tables: its candidates, and a call that launches it at a shape. A
candidate counts only if it runs and its result agrees with the default configuration's.

    {"gpu": ..., "date": ..., "versions": ..., "operators": {op: {dtype: {token bucket: {...}}}}}
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import triton
from torch import Tensor

from pixart_rt.kernels import catalog, launch
from pixart_rt.kernels.attention import attention_triton
from pixart_rt.kernels.attention_backward import attention_backward_triton
from pixart_rt.kernels.gate_residual import gate_residual_ln_modulate_triton
from pixart_rt.kernels.linear import linear_triton
from pixart_rt.kernels.ln_modulate import ln_modulate_backward_triton, ln_modulate_triton

HEADS, HEAD_DIM, ROWS = 16, 72, 6
WIDTH = HEADS * HEAD_DIM
TOKENS = (256, 1024, 4096)  # of an image at 256, 512 and 1024 px
BATCHES = (2, 32)
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, slots=True)
class Subject:
    """One tunable launch. `make(B, N, device, dtype)` gives a call that returns its outputs."""

    op: str
    candidates: tuple[dict[str, int], ...]
    make: Callable[[int, int, torch.device, torch.dtype], Callable[[], Any]]


def grid(**axes: Iterable[int]) -> tuple[dict[str, int], ...]:
    """Every combination of the values, as configurations."""
    return tuple(
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    )


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _modulated(device: torch.device, dtype: torch.dtype, B: int) -> tuple[Tensor, Tensor]:
    shared = _normal(device, torch.float32, B, ROWS, WIDTH)
    return _normal(device, dtype, ROWS, WIDTH), shared


def _norm(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x, rows = _normal(device, dtype, B, N, WIDTH), _modulated(device, dtype, B)
    return lambda: ln_modulate_triton(x, *rows, 0)[0]


def _norm_backward(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x, rows = _normal(device, dtype, B, N, WIDTH), _modulated(device, dtype, B)
    _, _, mean, rstd = ln_modulate_triton(x, *rows, 0)
    dy = _normal(device, dtype, B, N, WIDTH)
    return lambda: ln_modulate_backward_triton(dy, x, mean, rstd, *rows, 0)


def _gate(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x, branch = _normal(device, dtype, 2, B, N, WIDTH).unbind()
    rows = _modulated(device, dtype, B)
    return lambda: gate_residual_ln_modulate_triton(x, branch, *rows, 5, *rows, 0)[:2]


def _attention(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    qkv = _normal(device, dtype, B, N, 3, HEADS, HEAD_DIM)
    return lambda: attention_triton(qkv)


def _attention_backward(
    B: int, N: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    qkv = _normal(device, dtype, B, N, 3, HEADS, HEAD_DIM)
    out, lse = attention_triton(qkv)
    dout = torch.randn_like(out)
    return lambda: attention_backward_triton(dout, qkv, out, lse)


def _linear(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x, residual = _normal(device, dtype, 2, B, N, WIDTH).unbind()
    weight, bias = _normal(device, dtype, WIDTH, WIDTH), _normal(device, dtype, WIDTH)
    gate = (*_modulated(device, dtype, B), 5)
    return lambda: linear_triton(
        x, weight, bias, residual=residual, gate=gate, op="linear_gate_residual"
    )[0]


_ELEMENTWISE = grid(ROWS=(1, 2, 4, 8), num_warps=(4, 8))
_TILES = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
_GEMM_TILES = grid(
    BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(2, 3, 4)
)
SUBJECTS = (
    Subject("ln_modulate", _ELEMENTWISE, _norm),
    Subject("ln_modulate_backward", grid(ROWS=(8, 16, 32, 64), num_warps=(4, 8)), _norm_backward),
    Subject("gate_residual_ln_modulate", _ELEMENTWISE, _gate),
    Subject("linear_gate_residual", _GEMM_TILES, _linear),
    Subject("attention", _TILES, _attention),
    Subject("attention_backward_kv", _TILES, _attention_backward),
    Subject("attention_backward_q", _TILES, _attention_backward),
)


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of repeated calls, with the L2 cache cleared before each."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def tune(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Iterable[tuple[int, int]] | None = None,
    subjects: Iterable[Subject] = SUBJECTS,
    timer: Timer = milliseconds,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table of the fastest configuration of every subject at every (B, N) of `shapes`."""
    chosen = list(shapes or itertools.product(BATCHES, TOKENS))
    operators: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    name = str(dtype).removeprefix("torch.")
    for subject in subjects:
        for B, N in chosen:
            call = subject.make(B, N, device, dtype)
            best, slowest = _fastest(subject, call, timer)
            bucket = launch.shape_key((B * N,))
            operators.setdefault(subject.op, {}).setdefault(name, {})[bucket] = best
            report(f"{subject.op} {B}x{N}: {best} ({slowest})")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return {
        "gpu": gpu,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "operators": operators,
    }


def _fastest(subject: Subject, call: Callable[[], Any], timer: Timer) -> tuple[dict[str, int], str]:
    """The fastest candidate that runs and is right; {} is the default. And a line about it."""
    expected = catalog.flat(call())
    best, least = {}, timer(call)
    default = least
    for candidate in subject.candidates:
        with launch.forcing(subject.op, candidate):
            try:
                actual = catalog.flat(call())
            except (triton.runtime.errors.OutOfResources, triton.CompilationError):
                continue  # it does not fit this GPU
            wrong = any(
                not catalog.relative_error(a, b) <= catalog.TOLERANCE[b.dtype]
                for a, b in zip(actual, expected, strict=True)
            )
            if wrong:
                continue
            time = timer(call)
        if time < least:
            best, least = candidate, time
    return dict(best), f"{least:.4g} ms, the default {default:.4g} ms"
