"""What a GPU's own libraries reach: the copy, the model's matrix products, SDPA at head widths.

    python -m benchmarks.limits                 writes benchmarks/results/limits.json
    python -m benchmarks.limits --json OUT --only ceilings

The products are those of a PixArt XL/2 block, as cuBLAS runs them in bfloat16 and, on Ada and
later, in fp8 with a scale for each row. The scores and sums of attention are counted at the head's
own width, so that padding to a wider tile shows. Times are medians of a CUDA graph over inputs that
pass the L2 cache twice; with the backward, of plain calls. Without a GPU tiny shapes are run, to
try the script; nothing is measured then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.provenance import result_file
from pixart_rt.bench.gpu_lock import alone
from pixart_rt.bench.provenance import ResultFile, first_line
from pixart_rt.bench.roofline import ceilings, factors, product
from pixart_rt.bench.timing import rotations, seconds_per_call
from pixart_rt.kernels.launch import SM89

WIDTH, TEXT, CAPTION, HEADS = 1152, 120, 4096, 16
# name -> (inputs, outputs, whether its rows are text tokens)
PRODUCTS = {
    "qkv": (WIDTH, 3 * WIDTH, False),
    "projection": (WIDTH, WIDTH, False),  # attention's output; the cross-attention's query, output
    "ffn in": (WIDTH, 4 * WIDTH, False),
    "ffn out": (4 * WIDTH, WIDTH, False),
    "text kv": (WIDTH, 2 * WIDTH, True),
    "caption": (CAPTION, WIDTH, True),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEAD_DIMS = (64, 72, 80, 96, 128)


def products(
    tokens: tuple[int, ...], batches: tuple[int, ...], device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each product, number of rows and dtype."""
    dtypes = [torch.bfloat16]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= SM89:
        dtypes.append(torch.float8_e4m3fn)
    for name, (K, N, text) in PRODUCTS.items():
        for M in sorted({B * (TEXT if text else n) for B in batches for n in tokens}):
            for dtype in dtypes:
                first = factors(M, N, K, dtype, device)
                sets = [first]
                while len(sets) < rotations(device, first):
                    sets.append(tuple(each.clone() for each in first))
                seconds = seconds_per_call(product, sets)
                flops = 2 * M * N * K
                yield {"product": name, "m": M, "n": N, "k": K, "seconds": seconds,
                       "dtype": str(dtype).removeprefix("torch."),
                       "tflop_per_s": flops / seconds / 1e12}  # fmt: skip


def attention(
    tokens: tuple[int, ...], batch: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each backend, head width and number of tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for N in tokens:
        for d in HEAD_DIMS:

            def inputs(N: int = N, d: int = d) -> tuple[Tensor, ...]:
                shape = (3, batch, HEADS, N, d)
                return torch.randn(shape, device=device, dtype=dtype).unbind()

            first = inputs()
            sets = [first, *(inputs() for _ in range(1, rotations(device, first)))]
            for name, backend in BACKENDS.items():
                row: dict[str, Any] = {"backend": name, "head_dim": d, "tokens": N, "batch": batch}
                try:
                    with sdpa_kernel(backend), alone():
                        forward = seconds_per_call(F.scaled_dot_product_attention, sets)
                        both = seconds_per_call(_train, sets, graph=False)
                except Exception as refusal:
                    yield row | {"refused": first_line(refusal)}
                    continue
                flops = 4 * batch * HEADS * N * N * d
                yield row | {"seconds": forward, "forward_backward_seconds": both,
                             "tflop_per_s": flops / forward / 1e12}  # fmt: skip


def _train(*inputs: Tensor) -> None:
    q, k, v = (each.detach().requires_grad_() for each in inputs)
    output = F.scaled_dot_product_attention(q, k, v)
    torch.autograd.grad(output, (q, k, v), torch.ones_like(output))


def run(device: torch.device, minutes: float, save: ResultFile, only: str | None) -> dict[str, Any]:
    """The file's values, without provenance, saved as they come."""
    cuda = device.type == "cuda"
    tokens, batches = ((256, 1024, 4096), (2, 32)) if cuda else ((8,), (1,))
    started = time.monotonic()
    values: dict[str, Any] = {
        "measured": cuda, "ceilings": ceilings(device), "products": [], "attention": [],
        "not_run": [],
    }  # fmt: skip
    print(values["ceilings"], flush=True)
    for name, rows in (
        ("attention", attention(tokens, 2 if cuda else 1, device)),
        ("products", products(tokens, batches, device)),
    ):
        for row in rows if only is None else ():
            values[name].append(row)
            save(values)
            print(" ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
            if time.monotonic() - started > 60 * minutes:
                values["not_run"].append({"operator": f"the rest of {name}", "because": "time"})
                break
    return values


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--minutes", type=float, default=3, help="start nothing after this")
    parser.add_argument("--only", choices=("ceilings",), help="the large copy and products alone")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save = result_file(args.json, "limits", measured=device.type == "cuda")
    save(run(device, args.minutes, save, args.only))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
