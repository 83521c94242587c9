"""The denoising loop of PixArt XL/2 as a request runs it: one CUDA graph of 20 steps, per step.

    python -m benchmarks.loop                          writes benchmarks/results/loop.json
    python -m benchmarks.loop --res 1024 --images 1 16 --qualities high,fast --json OUT
    python -m benchmarks.loop --model tiny --res 256 --json OUT        to try on a CPU

Random weights, bfloat16, backend `torch`, guidance, so two rows an image. Everything that
docs/performance.md says is computed once is: the unconditional text is constant, and the prompt, of
as many tokens as asked, is absorbed where it is short. The time is the loop's over its steps:
transformer, guidance and solver, without text encoder and VAE. Without a GPU the loop runs once
without a graph, to try the script; nothing is measured then.

The graph's latents are compared with those of the same loop run step by step; a difference above
1e-3 of their norm is listed instead of a time, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance, write_result
from benchmarks.timing import seconds_per_call
from benchmarks.turns import alone, aside
from pixart_rt.buckets import bucket_for_aspect
from pixart_rt.config import EngineConfig, Precision, Quality, SamplingConfig
from pixart_rt.denoising import Item
from pixart_rt.export.build import build
from pixart_rt.graphs import Graphs
from pixart_rt.pipeline import PixArtPipeline
from pixart_rt.prompts import Encoded

TOLERANCE = 1e-3
PROMPTS = (12, 30, 100)  # tokens: absorbed at 16 and at 32, attended as they are


def encoded(pipe: PixArtPipeline, tokens: int, random: torch.Generator) -> Encoded:
    """Random text of so many tokens, alone in its row."""
    config = pipe.config
    embeds = torch.randn(1, config.max_text_tokens, config.caption_channels, generator=random)
    mask = torch.arange(config.max_text_tokens)[None] < tokens
    return Encoded((embeds * mask[..., None]).to(pipe.device), mask.to(pipe.device), (tokens,))


def items(pipe: PixArtPipeline, images: int, tokens: int) -> list[Item]:
    random = torch.Generator().manual_seed(tokens)
    bucket = bucket_for_aspect(pipe.resolution, "1:1")
    text, null = encoded(pipe, tokens, random), encoded(pipe, 1, random)
    return [
        Item(bucket=bucket, seed=seed, guidance_scale=4.5, text=f"{tokens} tokens", encoded=text,
             null_text="", null=null)
        for seed in range(images)
    ]  # fmt: skip


def measure(pipe: PixArtPipeline, images: int, tokens: int, steps: int) -> dict[str, Any]:
    """One row: the comparison and, where it holds, the seconds of a step."""
    denoiser, sampling = pipe.denoiser, SamplingConfig(num_inference_steps=steps)
    denoiser.graphs = Graphs()  # those of other sizes would fill the memory
    wanted = items(pipe, images, tokens)
    expected = torch.cat(denoiser(wanted, sampling, lambda _: None, None))
    denoiser.warm(wanted, sampling)
    actual = torch.cat(denoiser(wanted, sampling, lambda _: None, None))
    error = float((actual - expected).norm() / expected.norm())
    row: dict[str, Any] = {"error": error, "agrees": error <= TOLERANCE}
    if row["agrees"]:
        seconds = seconds_per_call(
            lambda _: denoiser(wanted, sampling, lambda _: None, None), [(expected,)], graph=False
        )
        row["seconds"] = seconds / steps
        row["graph_replays"] = denoiser.graphs.replays
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The file's values, without provenance."""
    cuda = torch.cuda.is_available()
    started, rows, left_out = time.monotonic(), [], []
    for resolution in args.res:
        for quality in args.qualities.split(","):
            with tempfile.TemporaryDirectory() as folder:
                config = EngineConfig(
                    resolution=resolution, backend="torch", quality=Quality(quality),
                    precision=Precision.BF16 if cuda else Precision.FP32,
                    max_batch=max(args.images), components=("transformer", "vae_decoder"),
                )  # fmt: skip
                with aside():  # it compares a step with float32 on the GPU: less than a second
                    bundle = build(args.model, Path(folder) / "bundle", config).path
                    pipe = PixArtPipeline.from_bundle(bundle)
                for images in args.images:
                    for tokens in PROMPTS:
                        row = {"pixels": resolution, "quality": quality, "images": images,
                               "prompt_tokens": tokens}  # fmt: skip
                        if time.monotonic() - started > 60 * args.minutes:
                            left_out.append(row)
                            continue
                        rows.append(row | measure(pipe, images, tokens, args.steps))
                        print(rows[-1], flush=True)
                del pipe
    return {"measured": cuda, "model": args.model, "steps": args.steps, "tolerance": TOLERANCE,
            "rows": rows, "not_run_for_time": left_out}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--model", default="xl-random", help="as of `pixart-rt build`")
    parser.add_argument("--res", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="of a batch; default 1")
    parser.add_argument("--qualities", default="high", help="comma list of high, fast (fp8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps; default 20")
    parser.add_argument("--minutes", type=float, default=10, help="start nothing after this")
    args = parser.parse_args()
    with alone(), torch.no_grad():
        values = run(args)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), **values}, indent=1) + "\n")
    elif values["measured"]:
        print(write_result("loop", values))
    return 0 if all(row["agrees"] for row in values["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
