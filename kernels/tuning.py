"""Measure launch configurations and implementations on the GPU at hand, for launch.py's tables.

A subject is one entry of the tables' "operators": its candidates, and a call that launches it at
a shape. A contest is one of their "choices": implementations of an operator, together with the
operator that each leaves to be done. A candidate counts only if it runs and its result agrees with
that of the default.

    {"gpu": ..., "date": ..., "versions": ...,
     "operators": {op: {dtype: {shape: {...}}}}, "choices": {op: {dtype: {shape: name}}},
     "not_tried": ["op shape", ...], "failed": ["op shape: why", ...]}

Entries are keyed by what an operator's time depends on (launch.config), so no shape's entry is
another's.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.errors import TritonError

from pixart_rt.kernels import catalog, launch
from pixart_rt.kernels.attention import attention_qkv_packed, attention_triton
from pixart_rt.kernels.attention_backward import attention_backward_triton
from pixart_rt.kernels.attention_choice import IMPLEMENTATIONS
from pixart_rt.kernels.cross_attention import (
    absorbed_scores_triton,
    cross_attention_backward_triton,
    cross_attention_triton,
)
from pixart_rt.kernels.fp8_linear import fp8_linear, quantize_rows
from pixart_rt.kernels.gate_residual import (
    gate_residual,
    gate_residual_backward_triton,
    gate_residual_ln_modulate,
    gate_residual_ln_modulate_triton,
    gate_residual_triton,
)
from pixart_rt.kernels.linear import SCALE_GROUP, linear_gate_residual, linear_triton
from pixart_rt.kernels.ln_modulate import (
    ln_modulate,
    ln_modulate_backward_triton,
    ln_modulate_triton,
)

HEADS, HEAD_DIM, ROWS, TEXT = 16, 72, 6, 120
WIDTH = HEADS * HEAD_DIM
TOKENS = (4096, 256, 1024)  # of an image at 1024, 256 and 512 px: what matters most first
BATCHES = (2, 32)
SHARED_BYTES = 232_448  # of a program on Hopper: larger tiles are not tried
Shape = tuple[int, ...]
Configuration = dict[str, int]
Call = Callable[[], Any]
Timer = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Subject:
    """One tunable launch: `make(shape, device, dtype)` gives a call that returns its outputs."""

    op: str  # as the tables name it
    candidates: tuple[Configuration, ...]
    shapes: Callable[[int, int], Iterable[Shape]]  # of B rows with N tokens
    make: Callable[[Shape, torch.device, torch.dtype], Call]


@dataclass(frozen=True, slots=True)
class Contest:
    """Implementations of one operator; `make` gives a call that runs the one that is chosen."""

    op: str
    names: tuple[str, ...]  # the default first
    shapes: Callable[[int, int], Iterable[Shape]]
    make: Callable[[Shape, torch.device, torch.dtype], Call]


def grid(**axes: Iterable[int]) -> tuple[Configuration, ...]:
    """Every combination of the values, as configurations."""
    return tuple(
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    )


def gemm_tiles(**axes: Iterable[int]) -> tuple[Configuration, ...]:
    """The combinations whose 16-bit tiles fit in shared memory in all stages."""
    return tuple(
        each
        for each in grid(**axes)
        if 2 * (each["BLOCK_M"] + each["BLOCK_N"]) * each["BLOCK_K"] * each["num_stages"]
        <= SHARED_BYTES
    )


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _modulated(device: torch.device, dtype: torch.dtype, B: int) -> tuple[Tensor, Tensor]:
    shared = _normal(device, torch.float32, B, ROWS, WIDTH)
    return _normal(device, dtype, ROWS, WIDTH), shared


def _images(rows: int) -> tuple[int, int]:
    """Rows of a matrix product as those of two images, an odd number as one's."""
    return (2, rows // 2) if rows % 2 == 0 else (1, rows)


def _norm(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    B, N = _images(*shape)
    x, rows = _normal(device, dtype, B, N, WIDTH), _modulated(device, dtype, B)
    return lambda: ln_modulate_triton(x, *rows, 0)[0]


def _norm_backward(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    B, N = _images(*shape)
    x, rows = _normal(device, dtype, B, N, WIDTH), _modulated(device, dtype, B)
    stats = ln_modulate_triton(x, *rows, 0, stats=True)[2]
    assert stats is not None
    dy = _normal(device, dtype, B, N, WIDTH)
    return lambda: ln_modulate_backward_triton(dy, x, stats, *rows, 0)[::2]


def _gate(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    B, N = _images(*shape)
    x, branch = _normal(device, dtype, 2, B, N, WIDTH).unbind()
    rows = _modulated(device, dtype, B)
    return lambda: gate_residual_ln_modulate_triton(x, branch, *rows, 5, *rows, 0)[:2]


def _residual(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    B, N = _images(*shape)
    x, branch = _normal(device, dtype, 2, B, N, WIDTH).unbind()
    gate = (*_modulated(device, dtype, B), 5)
    return lambda: gate_residual_triton(x, branch, gate)


def _residual_backward(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    B, N = _images(*shape)
    dout, branch = _normal(device, dtype, 2, B, N, WIDTH).unbind()
    gate = (*_modulated(device, dtype, B), 5)
    return lambda: gate_residual_backward_triton(dout, branch, gate)


def _qkv(shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    images, N = shape[0] // HEADS, shape[1]
    return _normal(device, dtype, images, N, 3, HEADS, HEAD_DIM)


def _attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    qkv = _qkv(shape, device, dtype)
    return lambda: attention_triton(qkv)


def _attention_backward(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    qkv = _qkv(shape, device, dtype)
    out, lse = attention_triton(qkv)
    dout = torch.randn_like(out)
    return lambda: attention_backward_triton(dout, qkv, out, lse)


def _text(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, kv and the mask of cross-attention to a prompt of 77 of 120 tokens."""
    images, N = shape[0] // HEADS, shape[1]
    q = _normal(device, dtype, images, N, HEADS, HEAD_DIM)
    kv = _normal(device, dtype, images, TEXT, 2, HEADS, HEAD_DIM)
    return q, kv, (torch.arange(TEXT, device=device) < 77).expand(images, -1).contiguous()


def _cross(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    inputs = _text(shape, device, dtype)
    return lambda: cross_attention_triton(*inputs)


def _cross_backward(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    inputs = _text(shape, device, dtype)
    out, lse = cross_attention_triton(*inputs)
    dout = torch.randn_like(out)
    return lambda: cross_attention_backward_triton(dout, *inputs, out, lse)


def _absorbed(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    rows, width, columns = shape
    B, N = _images(rows)
    x, keys = _normal(device, dtype, B, N, width), _normal(device, dtype, B, columns, width)
    bias = _normal(device, torch.float32, B, HEADS, columns // HEADS)
    return lambda: absorbed_scores_triton(x, keys, bias)


def _linear_inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows, I, O = shape
    B, N = _images(rows)
    weight = _normal(device, dtype, O, I) / I**0.5
    return _normal(device, dtype, B, N, I), weight, _normal(device, dtype, O)


def _linear(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    x, weight, bias = _linear_inputs(shape, device, dtype)
    residual = _normal(device, dtype, *x.shape[:2], shape[2])
    gate = (*_modulated(device, dtype, len(x)), 5)
    return lambda: linear_triton(
        x, weight, bias, residual=residual, gate=gate, op="linear_gate_residual"
    )[0]


def _gelu(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """As in training: in inference GELU is cuBLASLt's."""
    inputs = _linear_inputs(shape, device, dtype)
    return lambda: linear_triton(*inputs, gelu=True, store=True, op="linear_gelu")


def _fp8(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    x, weight, bias = _linear_inputs(shape, device, dtype)
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), quantize_rows(weight)
    return lambda: linear_triton(
        x, weight, bias, scales=(x_scale, weight_scale), dtype=dtype, op="fp8_linear"
    )[0]


def _fp8_gelu(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """With its output in fp8, as the next linear takes it."""
    x, weight, bias = _linear_inputs(shape, device, dtype)
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), quantize_rows(weight)
    return lambda: linear_triton(
        x, weight, bias, gelu=True, scales=(x_scale, weight_scale), dtype=x.dtype,
        op="fp8_linear_gelu_quantized",
    )  # fmt: skip


def _rows(B: int, N: int) -> list[Shape]:
    return [(B * N,)]


def _heads(B: int, N: int) -> list[Shape]:
    return [(B * HEADS, N)]


def _columns(B: int, N: int) -> list[Shape]:
    return [(B * N, WIDTH, HEADS * length) for length in (16, 32, 64)]


def _products(*sizes: tuple[int, int]) -> Callable[[int, int], list[Shape]]:
    return lambda B, N: [(B * N, I, O) for I, O in sizes]


_FORWARD = grid(ROWS=(1, 2, 4), num_warps=(1, 2, 4, 8))
_BACKWARD = grid(ROWS=(4, 8, 16, 32), TILE=(1, 2), num_warps=(4, 8))
_ELEMENTWISE = grid(ROWS=(2, 4, 8, 16), num_warps=(2, 4, 8))
_TILES = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))
_MASKED = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2,))
_SCORES = gemm_tiles(
    BLOCK_M=(64, 128), BLOCK_N=(128,), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4, 5)
)
_GEMM = gemm_tiles(
    BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_K=(64, 128), num_warps=(4, 8),
    num_stages=(3, 4, 5, 6, 8),
)  # fmt: skip
_FP8 = tuple(each for each in _GEMM if each["BLOCK_K"] == 128)
_FP8_GROUPS = tuple(each for each in _FP8 if each["BLOCK_N"] == SCALE_GROUP)
GATED = ((WIDTH, WIDTH), (4 * WIDTH, WIDTH))
FP8_SIZES = (
    (WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH),
)  # fmt: skip
SUBJECTS = (
    Subject("attention", _TILES, _heads, _attention),
    Subject("linear_gate_residual", _GEMM, _products(*GATED), _linear),
    Subject("ln_modulate", _FORWARD, _rows, _norm),
    Subject("gate_residual_ln_modulate", _FORWARD, _rows, _gate),
    Subject("gate_residual", _ELEMENTWISE, _rows, _residual),
    Subject("cross_attention", _MASKED, _heads, _cross),
    Subject(
        "cross_attention_absorbed",
        tuple({k: v for k, v in each.items() if k != "BLOCK_N"} for each in _SCORES),
        _columns,
        _absorbed,
    ),
    Subject("fp8_linear", _FP8, _products(*FP8_SIZES), _fp8),
    Subject("fp8_linear_gelu_quantized", _FP8_GROUPS, _products((WIDTH, 4 * WIDTH)), _fp8_gelu),
    Subject("attention_backward_kv", _TILES, _heads, _attention_backward),
    Subject("attention_backward_q", _TILES, _heads, _attention_backward),
    Subject("linear_gelu", _GEMM, _products((WIDTH, 4 * WIDTH)), _gelu),
    Subject("cross_attention_backward_kv", _MASKED, _heads, _cross_backward),
    Subject("cross_attention_backward_q", _MASKED, _heads, _cross_backward),
    Subject("ln_modulate_backward", _BACKWARD, _rows, _norm_backward),
    Subject("gate_residual_backward", _ELEMENTWISE, _rows, _residual_backward),
)


def _attention_forms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    qkv = _qkv(shape, device, dtype)
    return lambda: attention_qkv_packed(qkv)


def _gemm_forms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    x, weight, bias = _linear_inputs(shape, device, dtype)
    residual = _normal(device, dtype, *x.shape[:2], shape[2])
    gate = (*_modulated(device, dtype, len(x)), 5)
    return lambda: linear_gate_residual(x, weight, bias, *gate, residual)


def _residual_forms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """With a gate: attention's projection, which no LayerNorm follows."""
    x, weight, bias = _linear_inputs(shape, device, dtype)
    residual = _normal(device, dtype, *x.shape[:2], shape[2])
    gate = (*_modulated(device, dtype, len(x)), 5)

    def call() -> Tensor:
        if launch.choice("linear_residual", x, shape, "epilogue") == "epilogue":
            return linear_gate_residual(x, weight, bias, *gate, residual)
        return gate_residual(residual, F.linear(x, weight, bias), *gate)

    return call


def _residual_norm_forms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """With the LayerNorm and modulation that follow."""
    x, weight, bias = _linear_inputs(shape, device, dtype)
    residual = _normal(device, dtype, *x.shape[:2], shape[2])
    rows = _modulated(device, dtype, len(x))

    def call() -> tuple[Tensor, Tensor]:
        if launch.choice("linear_residual_norm", x, shape, "cublas") == "epilogue":
            out = linear_gate_residual(x, weight, bias, *rows, 5, residual)
            return out, ln_modulate(out, *rows, 0)
        branch = F.linear(x, weight, bias)
        return gate_residual_ln_modulate(residual, branch, *rows, 5, *rows, 0)

    return call


def _fp8_forms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    x, weight, bias = _linear_inputs(shape, device, dtype)
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), quantize_rows(weight)

    def call() -> Tensor:
        named = launch.choice("fp8_linear", x, shape, "own")
        if named == "scaled_mm" and dtype != torch.bfloat16:
            raise RuntimeError("PyTorch's product of rows with scales gives bfloat16 only")
        return fp8_linear(x, x_scale, weight, weight_scale, bias, dtype)

    return call


CONTESTS = (
    Contest("attention_qkv_packed", IMPLEMENTATIONS, _heads, _attention_forms),
    Contest("linear_gate_residual", ("own", "quack"), _products(*GATED), _gemm_forms),
    Contest("linear_residual", ("epilogue", "cublas"), _products((WIDTH, WIDTH)), _residual_forms),
    Contest(
        "linear_residual_norm", ("cublas", "epilogue"), _products(*GATED), _residual_norm_forms
    ),
    Contest("fp8_linear", ("own", "scaled_mm"), _products(*FP8_SIZES), _fp8_forms),
)


def milliseconds(call: Call) -> float:
    """The median of repeated calls, with the L2 cache cleared before each."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def tune(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Iterable[tuple[int, int]] | None = None,
    subjects: Iterable[Subject] = SUBJECTS,
    contests: Iterable[Contest] = CONTESTS,
    timer: Timer = milliseconds,
    report: Callable[[str], None] = lambda line: None,
    seconds: float = float("inf"),
    workers: int = 0,
    save: Callable[[dict[str, Any]], None] = lambda table: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The table of the fastest configuration and implementation at every shape.

    `shapes` are (rows of a step, tokens of an image). Configurations come first: a contest is
    between tuned kernels. Nothing is begun after `seconds`; what was not tried is listed. Kernels
    that the self-test refused on this GPU in `dtype` are not tuned. With `workers` that many
    processes compile the candidates of SUBJECTS beforehand, into Triton's cache. `save` gets the
    table so far, after every entry.
    """
    sizes = list(shapes or ((B, N) for B, N in itertools.product(BATCHES, TOKENS)))
    began, name = clock(), str(dtype).removeprefix("torch.")
    found: dict[str, dict[str, Any]] = {"operators": {}, "choices": {}}
    not_tried, failed = list[str](), list[str]()
    table: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        **found,
        "not_tried": not_tried,
        "failed": failed,
    }
    here = device.index or 0
    refused = {op for op, index, kind in launch.refused() if (index, kind) == (here, dtype)}
    if workers:
        precompile(device, dtype, sizes, workers, seconds / 2)

    def run(kind: str, measured: Subject | Contest, shape: Shape) -> None:
        said = f"{measured.op} {launch.shape_key(shape)}"
        if clock() - began > seconds:
            not_tried.append(said)
            return
        if measured.op in refused:
            report(f"{said}: not tuned, the self-test refused the kernel")
            return
        best: Configuration | str | None
        try:
            call = measured.make(shape, device, dtype)
            if isinstance(measured, Subject):
                best, line = _fastest(measured, call, timer)
            else:
                best, line = _winner(measured, call, timer)
        except (TritonError, RuntimeError) as error:  # the inputs' own kernels, or memory
            failed.append(f"{said}: {_why(error)}")
            report(failed[-1])
            return
        if best is None:
            failed.append(f"{said}: {line}")
        else:
            kept = "float8_e4m3fn" if measured.op.startswith("fp8") else name
            entries = found[kind].setdefault(measured.op, {}).setdefault(kept, {})
            entries[launch.shape_key(shape)] = best
        report(f"{said}: {line}")
        save(table)

    for subject, shape in _ordered(subjects, sizes):
        run("operators", subject, shape)
    with launch.using(found):
        for contest, shape in _ordered(contests, sizes):
            run("choices", contest, shape)
    return table


def merged(older: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """`newer` with the entries of `older` for dtypes and shapes that it did not measure."""
    whole = dict(newer)
    for kind in ("operators", "choices"):
        whole[kind] = {}
        for table in (older, newer):
            for op, dtypes in table.get(kind, {}).items():
                for dtype, entries in dtypes.items():
                    whole[kind].setdefault(op, {}).setdefault(dtype, {}).update(entries)
    return whole


Measured = TypeVar("Measured", Subject, Contest)


def _ordered(
    measured: Iterable[Measured], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[Measured, Shape]]:
    """Every shape of every one, a size at a time: where time ends, the first sizes are whole."""
    done = set()
    everything = list(measured)
    for B, N in sizes:
        for each in everything:
            for shape in each.shapes(B, N):
                if (each.op, shape) not in done:
                    done.add((each.op, shape))
                    yield each, shape


def _outputs(call: Call) -> list[Tensor] | str:
    """What a call gives, or why it gives nothing: it does not fit this GPU, or is not installed."""
    try:
        return catalog.flat(call())
    except (TritonError, RuntimeError) as error:
        return _why(error)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _wrong(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return any(
        not catalog.relative_error(a, b) <= catalog.TOLERANCE[b.dtype]
        for a, b in zip(actual, expected, strict=True)
    )


def _fastest(subject: Subject, call: Call, timer: Timer) -> tuple[Configuration | None, str]:
    """The fastest configuration that runs and is right, {} for the default; and a line about it.

    None where nothing runs. Where the default does not, the first candidate that does is the one
    that others must agree with.
    """
    expected = _outputs(call)
    best: Configuration | None = None
    least, default = float("inf"), "does not run"
    if not isinstance(expected, str):
        best, least = {}, timer(call)
        default = f"{least:.4g} ms"
    for candidate in subject.candidates:
        with launch.forcing(subject.op, candidate):
            actual = _outputs(call)
            if isinstance(actual, str):
                continue
            if isinstance(expected, str):
                expected = actual
            if _wrong(actual, expected):
                continue
            taken = timer(call)
        if taken < least:
            best, least = dict(candidate), taken
    return best, f"{best}, {least:.4g} ms, the default {default}"


def _winner(contest: Contest, call: Call, timer: Timer) -> tuple[str | None, str]:
    """The fastest implementation that runs and agrees with the default; and a line about all."""
    times: dict[str, float] = {}
    lines = []
    expected: list[Tensor] | None = None
    for name in contest.names:
        with launch.choosing(contest.op, name):
            actual = _outputs(call)
            if isinstance(actual, str):
                lines.append(f"{name} {actual}")
                continue
            expected = actual if expected is None else expected
            if _wrong(actual, expected):
                lines.append(f"{name} differs")
                continue
            times[name] = timer(call)
            lines.append(f"{name} {times[name]:.4g} ms")
    return min(times, key=lambda name: times[name], default=None), ", ".join(lines)


def precompile(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int]],
    workers: int,
    seconds: float,
) -> None:
    """Compile the candidates of SUBJECTS side by side, into Triton's cache on the disk.

    Each process compiles by the path of a launch (JITFunction.warmup) on tensors without data. Ends
    after `seconds`; what is missing then is compiled when it is measured.
    """
    work = [
        (subject.op, shape, candidate)
        for subject, shape in _ordered(SUBJECTS, sizes)
        for candidate in ({}, *subject.candidates)
    ]
    context = multiprocessing.get_context("spawn")  # a GPU's context does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(compile_candidate, *each, device, dtype) for each in work]
        wait(jobs, seconds)
        for job in jobs:
            job.cancel()


def compile_candidate(
    op: str, shape: Shape, candidate: Configuration, device: torch.device, dtype: torch.dtype
) -> int:
    """Compile what a subject launches with this configuration; how many launches compiled."""
    subject = next(each for each in SUBJECTS if each.op == op)
    like = torch.empty(0, device=device)
    arch, gpu = launch.capability(like), launch.gpu_name(like)
    with launch.record(arch, gpu) as recorded:
        call = subject.make(shape, torch.device("meta"), dtype)
        recorded.clear()  # what makes the inputs
        with launch.forcing(op, candidate) if candidate else nullcontext():
            call()
    compiled = 0
    for each in recorded:
        with suppress(TritonError, RuntimeError):  # said when it is measured
            each.kernel.warmup(*each.args, grid=each.grid, **each.kwargs)
            compiled += 1
    return compiled
