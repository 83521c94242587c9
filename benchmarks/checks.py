"""Is it right on this GPU? Every kernel against float64, a block and a step, and captured graphs.

    python -m benchmarks.checks operators --dtypes bfloat16 --json OUT
    python -m benchmarks.checks model --res 256 1024 --json OUT

`operators` runs every operator on its awkward example and, in bfloat16, at PixArt XL/2's shapes,
forward and with gradients, on memory that holds NaN where nothing was written, and compares with
the plain form in float64. Kernels are called whether or not the self-test would refuse them; which
it refuses is said last. `model` compares one block of XL/2 with float64 and a whole step of 28 with
float32, both with the fused operators in bfloat16 (in float16 on a CPU: Triton's interpreter has no
products of bfloat16), and a step replayed from a CUDA graph, also on
other inputs than it was captured with, with the same step run eagerly.

Nothing is timed. A row that raises is listed and the others go on; after an illegal access, in a
process of its own. Without a GPU small shapes run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import Case, cases, wide
from benchmarks.model import DTYPE, SEED, Ours, config_of, inputs_for
from benchmarks.provenance import result_file
from benchmarks.rows import RESUME, Row, Rows, kernels_tested
from benchmarks.weights import random_state
from pixart_rt.config import Kernels, ModelConfig
from pixart_rt.kernels import catalog
from pixart_rt.kernels.catalog import TOLERANCE, flat, relative_error
from pixart_rt.kernels.launch import SM90, interpreting, refused_lines

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = ((2, 1024), (2, 4096))  # images, tokens: the tiles of 512 and 1024 px
BLOCK, STEP, REPLAY = 2e-2, 5e-2, 1e-3  # of the norm; benchmarks/model.py says why 5e-2
Check = tuple[Row, Callable[[], Row]]  # what is checked, and the rest of its row


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty fills with NaN
    assert torch.empty(3).isnan().all()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def compare(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> Row:
    """The worst relative error, in units of what rounding allows it to be; NaN is never right."""
    worst, allowed = 0.0, TOLERANCE[dtype]
    for one, other in zip(actual, expected, strict=True):
        limit = max(TOLERANCE[dtype], TOLERANCE[one.dtype])
        if one.dtype == torch.float8_e4m3fn and interpreting():
            limit = catalog.INTERPRETED_FP8
        error = relative_error(one, other)
        error = float("inf") if error != error else error
        if error / limit >= worst / allowed:
            worst, allowed = error, limit
    return {"error": worst, "allowed": allowed, "agrees": worst <= allowed}


def against_float64(
    run: Callable[..., Any], plain: Callable[..., Any], inputs: tuple[Any, ...],
    dtype: torch.dtype, trains: bool,
) -> Row:  # fmt: skip
    """Forward and, if it has any, gradients."""
    given = tuple(map(wide, inputs))
    with torch.no_grad():
        with poisoned():
            actual = flat(run(*inputs))
        row = compare(actual, flat(plain(*given)), dtype)
    if trains and row["agrees"]:
        with torch.enable_grad():
            with poisoned():
                actual = catalog._train(run, inputs)
            row |= {"with_gradients": True} | compare(actual, catalog._train(plain, given), dtype)
    return row


def operator_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Every operator on its example; on a GPU twice, and in bfloat16 also at the model's shapes."""
    here = torch.cuda.get_device_capability(device) if device.type == "cuda" else SM90
    name = str(dtype).removeprefix("torch.")
    for operator in catalog.OPERATORS:
        if dtype not in operator.dtypes:
            continue
        for seed in (1, 2) if device.type == "cuda" else (1,):
            row = {"subject": operator.name, "shape": f"example {seed}", "dtype": name}
            if here < operator.least:
                yield row, lambda: {"not_run": "the kernel is for newer GPUs"}
                continue

            def check(operator: Any = operator, seed: int = seed) -> Row:
                inputs = operator.example(device, dtype, seed)
                return against_float64(
                    operator.run, operator.reference, inputs, dtype, operator.trains
                )

            yield row, check
    if device.type == "cuda" and dtype == torch.bfloat16:
        for B, N in SHAPES:
            for case in cases(B, N, device, dtype):

                def check_case(case: Case = case) -> Row:
                    return against_float64(case.ours, case.plain, case.make(0), dtype, case.trains)

                yield {"subject": case.operator, "shape": case.shape, "dtype": name}, check_case


def model_checks(device: torch.device, resolutions: list[int]) -> Iterator[Check]:
    """One block, the whole step, and a captured one, at each size."""
    small = device.type != "cuda"
    for pixels in resolutions:
        published = config_of(pixels, small)
        one = replace(published, num_layers=1)
        row = {"subject": "one block", "pixels": pixels, "dtype": "float64"}
        yield row, partial(step_check, device, one, pixels, torch.float64, BLOCK)
        row = {"subject": "one step", "pixels": pixels, "dtype": "float32"}
        yield row, partial(step_check, device, published, pixels, torch.float32, STEP)
        row = {"subject": "graph replay", "pixels": pixels, "dtype": "eager"}
        yield row, partial(replay_check, device, one, pixels)


def step_check(
    device: torch.device, config: ModelConfig, pixels: int, dtype: torch.dtype, allowed: float
) -> Row:
    """The fused operators in 16 bits against the plain ones in a wider dtype."""
    half = DTYPE if device.type == "cuda" else torch.float16
    state = random_state(config, SEED, device)
    inputs = inputs_for(config, pixels // 16, 2, device)
    with torch.no_grad():
        expected = Ours(config, state, inputs, Kernels.REFERENCE, dtype).output()
        fused = Ours(config, state, inputs, Kernels.FUSED, half)
        with poisoned():
            actual = fused.output()
    error = relative_error(actual, expected)
    return {"error": error, "allowed": allowed, "agrees": error <= allowed}


def replay_check(device: torch.device, config: ModelConfig, pixels: int) -> Row:
    """A captured step on the inputs of the capture, and on others copied into their place."""
    if device.type != "cuda":
        return {"not_run": "no GPU"}
    inputs = inputs_for(config, pixels // 16, 2, device)
    model = Ours(config, random_state(config, SEED, device), inputs, Kernels.FUSED)
    errors = []
    with torch.no_grad():
        tokens = model.tokens()
        others = torch.randn_like(tokens)
        expected = [model.step(tokens).clone(), model.step(others).clone()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.step(tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model.step(tokens)
        for given, eager in zip((tokens.clone(), others), expected, strict=True):
            tokens.copy_(given)
            output.fill_(float("nan"))
            graph.replay()
            errors.append(relative_error(output, eager))
    worst = max(float("inf") if each != each else each for each in errors)
    return {"error": worst, "allowed": REPLAY, "agrees": worst <= REPLAY}


def told(row: Row) -> str:
    start = " ".join(str(row[key]) for key in ("dtype", "subject", "pixels", "shape") if key in row)
    if "not_run" in row or "failed" in row:
        return f"{start}: {row.get('failed') or 'not run: ' + row['not_run']}"
    gradients = " with gradients" if row.get("with_gradients") else ""
    verdict = "right" if row["agrees"] else "WRONG"
    return f"{start}: {verdict}, error {row['error']:.1e} of {row['allowed']:.0e}{gradients}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("operators", "model"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of operators; comma list")
    parser.add_argument("--res", type=int, nargs="+", help="of model; default 256 1024")
    parser.add_argument(RESUME, action="store_true", help="keep the rows of --json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not interpreting():
        parser.error("kernels were to be checked without a GPU; set TRITON_INTERPRET=1")
    save = result_file(args.json, "checks", measured=device.type == "cuda")
    values = {"measured": device.type == "cuda"}
    rows = Rows(save, told, values=values, resume=args.resume)
    if args.what == "operators":
        dtypes = [DTYPES[name] for name in args.dtypes.split(",")]
        checks: Iterator[Check] = chain.from_iterable(
            operator_checks(device, dtype) for dtype in dtypes
        )
    else:
        dtypes = [DTYPE]
        checks = model_checks(device, args.res or ([256, 1024] if device.type == "cuda" else [64]))
    for subject, check in checks:
        rows.add(subject, check)
    kernels_tested(device, *dtypes, training=True)
    for line in refused_lines():
        print(f"refused by the self-test: {line}")
    code = rows.end(refused_kernels=refused_lines())
    return 1 if refused_lines() else code


if __name__ == "__main__":
    raise SystemExit(main())
