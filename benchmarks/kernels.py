"""Every kernel at PixArt XL/2's shapes, and those of PyTorch, torch.compile and other libraries.

    python -m benchmarks.kernels                    writes benchmarks/results/kernels.json
    python -m benchmarks.kernels --json OUT.json    at OUT.json; --minutes 4.5 is the time limit

256, 512 and 1024 px (256, 1024 and 4096 tokens) with batches of 2 and 32, bfloat16, random data.
Forward times are replays of a CUDA graph over inputs that pass the L2 cache twice; forward with
backward is timed without a graph, so small sizes show launches. Bytes count each tensor once,
operations those of the formula. Errors are those of ours and of eager PyTorch against the plain
form in float64, at a batch of 2. What the time limit leaves out is listed as not run; peers are
compiled last. A row names the kernels that the self-test refused: there ours is PyTorch's. Without
a GPU tiny shapes are run, to try the script; nothing is measured then.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from benchmarks.provenance import result_file
from benchmarks.rows import RESUME, Row, Rows, kernels_tested
from pixart_rt.bench.gpu_lock import compiler_waits
from pixart_rt.bench.provenance import ResultFile, first_line
from pixart_rt.bench.roofline import ceilings
from pixart_rt.bench.timing import nbytes, rotations, seconds_per_call
from pixart_rt.kernels.attention import attention_qkv_packed, attention_ref
from pixart_rt.kernels.catalog import TOLERANCE, flat, relative_error
from pixart_rt.kernels.cross_attention import cross_attention, cross_attention_ref
from pixart_rt.kernels.fp8_linear import fp8_linear, fp8_linear_ref, quantize_rows
from pixart_rt.kernels.gate_residual import (
    gate_residual_ln_modulate,
    gate_residual_ln_modulate_ref,
)
from pixart_rt.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from pixart_rt.kernels.launch import SM89
from pixart_rt.kernels.linear import (
    linear_gate_residual,
    linear_gate_residual_ref,
    linear_gelu,
    linear_gelu_ref,
)
from pixart_rt.kernels.ln_modulate import ln_modulate, ln_modulate_ref
from pixart_rt.kernels.solver import cfg_dpmpp_step, cfg_dpmpp_step_ref

HEADS, HEAD_DIM, TEXT = 16, 72, 120
WIDTH, HIDDEN = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM


@dataclass(frozen=True)
class Case:
    """One operator at one shape: inputs of a seed, ours, the plain one, and what it must do.

    `candidates` compute the same with other kernels; more can be added.
    """

    operator: str
    shape: str
    make: Callable[[int], tuple[Any, ...]]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    flops: float = 0.0
    trains: bool = True
    candidates: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def attention_plain(qkv: Tensor, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if backend is None:
        return attention_ref(q, k, v).transpose(1, 2).flatten(2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def flash_attention(qkv: Tensor, implementation: str) -> Tensor:
    """FlashAttention 3 or 4 in the place of SDPA's own; ImportError where it is not installed."""
    activate_flash_attention_impl(implementation)
    try:
        return attention_plain(qkv, SDPBackend.FLASH_ATTENTION)
    finally:
        restore_flash_attention_impl()


ATTENTION = {
    **{
        f"sdpa {name}": partial(attention_plain, backend=backend)
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    },
    **{name: partial(flash_attention, implementation=name) for name in ("FA3", "FA4")},
}


def linear_then_norm(x: Tensor, weight: Tensor, bias: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gate and residual in the GEMM, then the norm. `given`: gate rows, residual, norm rows."""
    gate_table, gate_shared, gate_row, residual, table, shared, row = given
    x = linear_gate_residual(x, weight, bias, gate_table, gate_shared, gate_row, residual)
    return x, ln_modulate(x, table, shared, row)


def cublas_then_fused_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    """The GEMM by cuBLAS, then gate, residual and norm in one kernel: as many launches."""
    gate_table, gate_shared, gate_row, residual, table, shared, row = given
    branch = F.linear(x, weight, bias)
    return gate_residual_ln_modulate(
        residual, branch, gate_table, gate_shared, gate_row, table, shared, row
    )


def linear_then_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    gate_table, gate_shared, gate_row, residual, table, shared, row = given
    x = linear_gate_residual_ref(x, weight, bias, gate_table, gate_shared, gate_row, residual)
    return x, ln_modulate_ref(x, table, shared, row)


def cases(B: int, N: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All operators for B images of N tokens."""
    shape = f"{B}x{N}"

    def normal(seed: int, *sizes: tuple[int, ...], kind: torch.dtype = dtype) -> list[Tensor]:
        random = torch.Generator(device).manual_seed(seed)
        return [torch.randn(s, generator=random, device=device, dtype=kind) for s in sizes]

    def modulation(seed: int) -> tuple[Tensor, Tensor]:
        table = normal(seed + 100, (6, WIDTH))[0]
        return table, normal(seed + 200, (B, 6, WIDTH), kind=torch.float32)[0]

    token = (B, N, WIDTH)
    yield Case("ln_modulate", shape, lambda s: (*normal(s, token), *modulation(s), 3),
               ln_modulate, ln_modulate_ref)  # fmt: skip
    yield Case(
        "gate_residual_ln_modulate", shape,
        lambda s: (*normal(s, token, token), *modulation(s), 5, *modulation(s + 1), 3),
        gate_residual_ln_modulate, gate_residual_ln_modulate_ref,
    )  # fmt: skip
    yield Case(
        "attention_qkv_packed", shape, lambda s: (*normal(s, (B, N, 3, HEADS, HEAD_DIM)),),
        attention_qkv_packed, attention_plain, 4.0 * B * N * N * WIDTH, candidates=ATTENTION,
    )  # fmt: skip
    mask = torch.zeros(B, TEXT, dtype=torch.bool, device=device)
    mask[:, :30] = True
    yield Case(
        "cross_attention", shape,
        lambda s: (*normal(s, (B, N, HEADS, HEAD_DIM), (B, TEXT, 2, HEADS, HEAD_DIM)), mask),
        cross_attention, cross_attention_ref, 4.0 * B * N * TEXT * WIDTH,
    )  # fmt: skip
    for inner in (WIDTH, HIDDEN):

        def residual(s: int, inner: int = inner) -> tuple[Any, ...]:
            x, w, b, r = normal(s, (B, N, inner), (WIDTH, inner), (WIDTH,), token)
            return x, w / inner**0.5, b, *modulation(s), 5, r

        yield Case(f"linear_gate_residual {inner}", shape, residual, linear_gate_residual,
                   linear_gate_residual_ref, 2.0 * B * N * inner * WIDTH)  # fmt: skip

        def residual_and_norm(
            s: int, make: Callable[[int], tuple[Any, ...]] = residual
        ) -> tuple[Any, ...]:
            return *make(s), *modulation(s + 1), 3

        yield Case(
            f"linear, gate, residual, norm {inner}", shape, residual_and_norm, linear_then_norm,
            linear_then_norm_ref, 2.0 * B * N * inner * WIDTH,
            candidates={"cublas, fused norm": cublas_then_fused_norm},
        )  # fmt: skip

    def gelu(s: int) -> tuple[Any, ...]:
        x, w, b = normal(s, token, (HIDDEN, WIDTH), (HIDDEN,))
        return x, w / WIDTH**0.5, b

    yield Case("linear_gelu", shape, gelu, linear_gelu, linear_gelu_ref,
               2.0 * B * N * WIDTH * HIDDEN)  # fmt: skip
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= SM89:

        def fp8(s: int) -> tuple[Any, ...]:
            x, w, b = gelu(s)
            return *quantize_rows(x), *quantize_rows(w), b, dtype

        yield Case("fp8_linear", shape, fp8, fp8_linear, fp8_linear_ref,
                   2.0 * B * N * WIDTH * HIDDEN, trains=False)  # fmt: skip
    half = max(B // 2, 1)

    def step(s: int) -> tuple[Any, ...]:
        x, last, c = normal(s, (half, N, 16), (half, N, 16), (8,), kind=torch.float32)
        return *normal(s + 1, (2 * half, N, 32)), x, last, c, 4

    side = int(2 * N**0.5)  # the widest blocks of an SD VAE, at latent resolution

    def image(s: int) -> tuple[Any, ...]:
        x, w, b = normal(s, (B, 512, side, side), (512,), (512,))
        return x.contiguous(memory_format=torch.channels_last), w, b, 32, 1e-6

    yield Case("group_norm_silu", shape, image, group_norm_silu, group_norm_silu_ref, trains=False)
    yield Case("cfg_dpmpp_step", shape, step, cfg_dpmpp_step, cfg_dpmpp_step_ref, trains=False)


def train(function: Callable[..., Any], *inputs: Any) -> None:
    """Forward and backward for every floating-point input."""
    leaves = [each.detach().requires_grad_() if _trainable(each) else each for each in inputs]
    outputs = flat(function(*leaves))
    wanted = [each for each in leaves if _trainable(each)]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(each) for each in outputs])


def wide(each: Any) -> Any:
    """An input in float64; what is quantized stays."""
    if isinstance(each, torch.dtype):
        return torch.float64
    return each.double() if _trainable(each) and each.dtype != torch.float8_e4m3fn else each


def _trainable(each: Any) -> bool:
    return isinstance(each, Tensor) and each.dtype.is_floating_point


def measure(case: Case, device: torch.device, compiled: bool, row: Row) -> Row:
    """Fill the row of a case: errors against float64 where that fits, seconds of every form, or why
    it has none. A result that is not right is not timed.
    """
    first = case.make(0)
    sets = [first, *(case.make(seed) for seed in range(1, rotations(device, first)))]
    with torch.no_grad():
        ours, plain = flat(case.ours(*first)), flat(case.plain(*first))
        checked = case.shape.startswith("2x")
        expected = flat(case.plain(*map(wide, first))) if checked else plain
        row |= {
            "errors": {
                name: max((relative_error(a, b) for a, b in zip(outputs, expected, strict=True)),
                          key=lambda off: float("inf") if off != off else off)
                for name, outputs in (("ours", ours), ("eager", plain))
            },
            "bytes": nbytes(first) + nbytes(ours), "against_float64": checked, "flops": case.flops,
        }  # fmt: skip
    given = first[0].dtype if first[0].dtype in TOLERANCE else ours[0].dtype
    allowed = max(TOLERANCE[given], *(TOLERANCE[each.dtype] for each in ours))
    row["agrees"] = row["errors"]["ours"] <= allowed
    del ours, plain, expected
    if not row["agrees"]:
        return row
    forms: dict[str, Callable[..., Any]] = {"ours": case.ours, "eager": case.plain}
    forms |= case.candidates
    if compiled and device.type == "cuda":
        forms["compiled"] = torch.compile(case.plain, mode="max-autotune-no-cudagraphs")
    row["seconds"] = seconds = _timed(forms, sets, graph=True)
    if case.trains:
        forms = {name: partial(train, form) for name, form in forms.items()
                 if not isinstance(seconds[name], str)}  # fmt: skip
        row["forward_backward_seconds"] = _timed(forms, sets[:2], graph=False)
    return row


def _timed(
    forms: dict[str, Callable[..., Any]], sets: list[tuple[Any, ...]], *, graph: bool
) -> dict[str, float | str]:
    """Seconds of each form, or the error that it raised: not installed, not for this shape."""
    found: dict[str, float | str] = {}
    for name, form in forms.items():
        try:
            with torch.set_grad_enabled(not graph):
                form(*sets[0])  # compiles: others may time meanwhile
                found[name] = seconds_per_call(form, sets, graph=graph)
        except Exception as error:
            if name in ("ours", "eager"):
                raise
            found[name] = first_line(error)
    return found


def line(row: Row) -> str:
    """One line: the operator, our error, time and rate, and each candidate's time."""
    start = f"{row['operator']:36}{row['shape']:9}"
    if "failed" in row:
        return start + str(row["failed"])
    start += f"error {row['errors']['ours']:.1e}"
    if not row["agrees"]:
        return f"{start}: differs from float64, not timed"
    ours = row["seconds"]["ours"]
    rate = (f"{row['flops'] / ours / 1e12:7.1f} TFLOP/s" if row["flops"]
            else f"{row['bytes'] / ours / 1e12:7.2f} TB/s   ")  # fmt: skip
    said = [
        "  ".join(f"{name} {1e6 * value:.1f}" for name, value in row[key].items()
                  if name != "ours" and not isinstance(value, str))
        for key in ("seconds", "forward_backward_seconds") if key in row
    ]  # fmt: skip
    return f"{start} {1e6 * ours:9.1f} us {rate}  " + "  | with backward: ".join(said)


def run(
    minutes: float,
    shapes: list[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    save: ResultFile,
    resume: bool = False,
) -> Rows:
    kernels_tested(device, dtype, training=True)
    values = {"measured": device.type == "cuda", "dtype": str(dtype), "ceilings": ceilings(device)}
    rows = Rows(save, line, values=values, minutes=minutes, resume=resume)
    for compiled in (False, True):  # the peers that take long come last
        for B, N in shapes if not compiled else shapes[:3]:
            if device.type == "cpu" and compiled:
                continue
            for case in cases(B, N, device, dtype):
                torch.compiler.reset()  # or a second size would be compiled for any
                row = {"operator": case.operator, "shape": case.shape, "with_compiled": compiled}
                rows.add(row, partial(measure, case, device, compiled, row))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--minutes", type=float, default=4.5, help="start nothing after this")
    parser.add_argument(RESUME, action="store_true", help="keep the rows of --json")
    args = parser.parse_args()
    compiler_waits()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [(2, 4096), (2, 256), (2, 1024), (32, 4096), (32, 256), (32, 1024)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    if device.type == "cpu":
        shapes = [(2, 37)]
    save = result_file(args.json, "kernels", measured=device.type == "cuda")
    return run(args.minutes, shapes, device, dtype, save, args.resume).end()


if __name__ == "__main__":
    raise SystemExit(main())
