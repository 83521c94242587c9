"""Attention in training on one CPU thread: by bfloat16 products against PyTorch's kernel.

    OMP_NUM_THREADS=1 python -m benchmarks.attention_products --out attention-products

CPU seconds of forward and backward, by turns, the median of pairs; the shapes are those of
recipes/tiny.toml on two ranks: self-attention and attention to 32 text tokens at 256, 512 and
1024 px. Where there is no bfloat16 unit this may find the products slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.provenance import write_result
from pixart_rt.bench.timing import elapsed_by, samples
from pixart_rt.kernels.attention import attention_ref
from pixart_rt.kernels.attention_products import attention_products
from pixart_rt.kernels.attention_tiles import HEAD

HEADS, TEXT = 2, 32
# px, images, tokens. The largest first: a process keeps its memory, as a run of many steps does.
SIZES = [(1024, 2, 4096), (512, 4, 1024), (256, 16, 256)]
WARMUP = 2  # pairs


def compare(
    images: int, queries: int, keys: int, mask: Tensor | None, repeats: int
) -> dict[str, float]:
    """Milliseconds of both, and the median of the ratios of pairs."""
    random = torch.Generator().manual_seed(0)

    def packed(tokens: int) -> Tensor:  # heads next to each other, as a linear leaves them
        shape = images, tokens, HEADS, HEAD
        rows = torch.randn(shape, generator=random).bfloat16()
        return rows.transpose(1, 2).requires_grad_()

    inputs = (packed(queries), packed(keys), packed(keys), mask)
    gradient = torch.randn(inputs[0].shape, generator=random).bfloat16()

    def train(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(*inputs), inputs[:3], gradient)

    calls = {each: partial(train, each) for each in (attention_products, attention_ref)}
    clock = partial(elapsed_by, time.process_time)
    ours, theirs = samples(calls, clock, repeats=repeats, warmup=WARMUP).values()
    median = statistics.median
    ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
    return {"products_ms": 1e3 * median(ours), "pytorch_ms": 1e3 * median(theirs), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="name under benchmarks/results, without .json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size, images, tokens in SIZES:
        for keys in (tokens, TEXT):
            mask = torch.ones(images, TEXT, dtype=torch.bool) if keys == TEXT else None
            found = compare(images, tokens, keys, mask, args.repeats)
            rows.append({"px": size, "images": images, "queries": tokens, "keys": keys, **found})
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        write_result(args.out, {"heads": HEADS, "head_width": HEAD, "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
