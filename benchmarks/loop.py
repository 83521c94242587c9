"""The denoising loop of PixArt XL/2 as a request runs it: one CUDA graph of 20 steps, per step.

    python -m benchmarks.loop                          writes benchmarks/results/loop.json
    python -m benchmarks.loop --res 1024 --images 1 16 --qualities high,fast --json OUT
    python -m benchmarks.loop --model tiny --res 256 --json OUT        to try on a CPU

Random weights, bfloat16, backend `torch`, guidance, so two rows an image. Everything that
docs/performance.md says is computed once is: the unconditional text is constant, and the prompt,
of as many tokens as asked, is absorbed where it is short. `seconds` are the loop's over its steps,
from inputs on the device: transformer, guidance and solver. `request_seconds` have also what the
host does for a request: noise, plan, caches, copies. Neither has text encoder or VAE. Without a GPU
the loop runs without a graph, to try the script; nothing is measured then.

The graph's latents are compared with those of the same loop run step by step; a difference above
1e-3 of their norm is listed instead of a time, and the exit code is 1. A row names the kernels that
the self-test refused when the model was loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import result_file
from benchmarks.rows import Rows
from pixart_rt.bench.gpu_lock import alone
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.bench.timing import seconds_per_call
from pixart_rt.buckets import bucket_for_aspect
from pixart_rt.config import EngineConfig, Precision, Quality, SamplingConfig
from pixart_rt.export.build import build
from pixart_rt.inference.cuda_graphs import Graphs
from pixart_rt.inference.denoiser import ImageInputs, plan_key
from pixart_rt.inference.pipeline import PixArtPipeline
from pixart_rt.inference.prompt_embeds import PromptEmbeds

TOLERANCE = 1e-3
PROMPTS = (12, 30, 100)  # tokens: absorbed at 16 and at 32, attended as they are


def embeds(pipe: PixArtPipeline, tokens: int, name: str, random: torch.Generator) -> PromptEmbeds:
    """Random text of so many tokens under that name, alone in its row."""
    config = pipe.config
    values = torch.randn(1, config.max_text_tokens, config.caption_channels, generator=random)
    mask = torch.arange(config.max_text_tokens)[None] < tokens
    values = (values * mask[..., None]).to(pipe.device)
    return PromptEmbeds(values, mask.to(pipe.device), (tokens,), (name,))


def inputs_of(pipe: PixArtPipeline, images: int, tokens: int) -> list[ImageInputs]:
    random = torch.Generator().manual_seed(tokens)
    bucket = bucket_for_aspect(pipe.resolution, "1:1")
    prompt = embeds(pipe, tokens, f"{tokens} tokens", random)
    negative = embeds(pipe, 1, "", random)
    return [
        ImageInputs(bucket=bucket, seed=seed, guidance_scale=4.5, prompt=prompt, negative=negative)
        for seed in range(images)
    ]


def measure(pipe: PixArtPipeline, images: int, tokens: int, steps: int) -> dict[str, Any]:
    """One row: the comparison and, where it holds, the seconds of a step."""
    denoiser, sampling = pipe.denoiser, SamplingConfig(num_inference_steps=steps)
    denoiser.graphs = Graphs()  # those of other sizes would fill the memory
    wanted = inputs_of(pipe, images, tokens)

    def request(*_: object) -> Tensor:
        return torch.cat(denoiser(wanted, sampling, lambda _: None, None).latents)

    expected = request()
    denoiser.warm(wanted, sampling)
    error = float((request() - expected).norm() / expected.norm())
    row: dict[str, Any] = {"error": error, "agrees": error <= TOLERANCE}
    if not row["agrees"]:
        return row
    plan = denoiser.planner(plan_key(wanted, sampling))
    inputs = denoiser.loop_inputs(wanted, sampling, plan)
    key = denoiser.graph_key(inputs, ())

    def loop(*_: object) -> Tensor:
        replayed = denoiser.graphs.replay(key, inputs)
        return denoiser.run_loop(inputs) if replayed is None else replayed

    with alone():
        row["seconds"] = seconds_per_call(loop, [(expected,)], graph=False) / steps
        row["graph_replays"] = denoiser.graphs.replays
        if pipe.device.type == "cuda" and not denoiser.graphs.replays:
            raise RuntimeError("no graph was replayed: the loop ran step by step")
        row["request_seconds"] = seconds_per_call(request, [(expected,)], graph=False) / steps
    return row


def run(args: argparse.Namespace, save: ResultFile) -> Rows:
    cuda = torch.cuda.is_available()
    values = {"measured": cuda, "model": args.model, "steps": args.steps, "tolerance": TOLERANCE}
    rows = Rows(save, str, values=values, minutes=args.minutes)
    for resolution in args.res:
        for quality in args.qualities.split(","):
            with tempfile.TemporaryDirectory() as folder:
                config = EngineConfig(
                    resolution=resolution, backend="torch", quality=Quality(quality),
                    precision=Precision.BF16 if cuda else Precision.FP32,
                    max_batch=max(args.images), components=("transformer", "vae_decoder"),
                )  # fmt: skip
                bundle = build(args.model, Path(folder) / "bundle", config).path
                pipe = PixArtPipeline.from_bundle(bundle)
                for images in args.images:
                    for tokens in args.prompts:
                        row = {"pixels": resolution, "quality": quality, "images": images,
                               "prompt_tokens": tokens}  # fmt: skip
                        rows.add(row, partial(measure, pipe, images, tokens, args.steps))
                del pipe
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--model", default="xl-random", help="as of `pixart-rt build`")
    parser.add_argument("--res", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="of a batch; default 1")
    parser.add_argument("--qualities", default="high", help="comma list of high, fast (fp8)")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens of them")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps; default 20")
    parser.add_argument("--minutes", type=float, default=10, help="start nothing after this")
    args = parser.parse_args()
    save = result_file(args.json, "loop", measured=torch.cuda.is_available())
    with torch.no_grad():
        return run(args, save).end()


if __name__ == "__main__":
    raise SystemExit(main())
