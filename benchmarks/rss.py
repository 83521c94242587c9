"""Resident memory over many mixed requests: does a serving process grow?

    python -m benchmarks.rss                         1,000 requests, benchmarks/results/rss.json
    python -m benchmarks.rss --requests 100 --json OUT

One pipeline of tiny at 256 px, backend torch, answers requests of all 40 shapes, prompts that never
come again, with and without a negative prompt, guidance and samplers, 1 or 2 steps each, called
alone and through `generate_many`. The resident set is read fifty times.

Prompts, their keys and values, and plans of shapes are kept up to bounds (512, 256 and 256 MiB),
which a thousand prompts of tiny do not fill. So that the run shows what a full cache does, each is
bounded to --cache-mib here; the bytes that they count are recorded next to the resident set. The
figure is the growth in the second half, a line fitted through its readings, in KiB a request.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.provenance import result_file
from pixart_rt import EngineConfig, PixArtPipeline, Request, build
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.buckets import buckets
from pixart_rt.inference.lru import Lru

RESOLUTION = 256
READINGS = 50
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star")
SAMPLERS = ("dpm-solver++", "dpm-solver++", "dpm-solver++", "ddim", "sa-solver")


def mixed_request(rng: random.Random, index: int) -> Request:
    """One of a production's many: its prompt is of its number, all else is drawn."""
    bucket = rng.choice(buckets(RESOLUTION))
    long = " and a small gray dot" * rng.choice((0, 0, 1, 6))
    return Request(
        prompt=f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} number {index}{long}",
        negative_prompt=rng.choice(("", "", f"a {rng.choice(SHAPES)} {index}")),
        seed=index,
        num_inference_steps=rng.choice((1, 2)),
        guidance_scale=rng.choice((1.0, 3.0, 4.5)),
        scheduler=rng.choice(SAMPLERS),
        height=bucket.height,
        width=bucket.width,
    )


def answer(pipe: PixArtPipeline, requests: list[Request]) -> None:
    """Half of them in batches, the others one by one."""
    half = len(requests) // 2
    pipe.generate_many(requests[:half])
    for result in pipe.stream(requests[half:]):
        assert result.error is None, result.error


def slope(readings: list[tuple[int, float]]) -> float:
    """KiB a request of a line through (requests, MiB)."""
    done, sizes = zip(*readings, strict=True)
    return float(np.polyfit(done, sizes, 1)[0]) * 1024


def caches(pipe: PixArtPipeline) -> dict[str, Lru[Any, Any]]:
    """All that a pipeline keeps from one request for the next, without a GPU."""
    assert pipe.prompt_encoder is not None
    return {
        "prompts": pipe.prompt_encoder.cache,
        "keys_and_values": pipe.denoiser.texts._kept,
        "plans": pipe.denoiser.planner._kept,
    }


def run(num_requests: int, cache_mib: float, folder: Path, save: ResultFile) -> dict[str, Any]:
    """Answer the requests; the readings and what they say."""
    config = EngineConfig(resolution=RESOLUTION, backend="torch", max_batch=4)
    build("tiny", folder / "bundle", config)
    pipe = PixArtPipeline.from_bundle(folder / "bundle", "cpu", check=False)
    kept = caches(pipe)
    for cache in kept.values():
        cache.max_bytes = cache_mib * 2**20
    rng, process = random.Random(0), psutil.Process()
    size = max(1, num_requests // READINGS)
    readings: list[tuple[int, float]] = []
    held: list[dict[str, float]] = []
    values: dict[str, Any] = {}
    for start in range(0, num_requests, size):
        count = min(size, num_requests - start)
        answer(pipe, [mixed_request(rng, start + index) for index in range(count)])
        gc.collect()
        readings.append((start + count, process.memory_info().rss / 2**20))
        held.append({name: round(each.num_bytes / 2**20, 2) for name, each in kept.items()})
        second = [each for each in readings if each[0] > (start + count) / 2]
        values = {
            "model": "tiny", "resolution": RESOLUTION, "backend": "torch",
            "threads": torch.get_num_threads(), "requests": start + count,
            "planned_requests": num_requests, "cache_bound_mib": cache_mib,
            "rss_mib": [[done, round(mib, 1)] for done, mib in readings],
            "cache_mib": held,
            "kib_per_request_second_half": round(slope(second), 1) if len(second) > 2 else None,
        }  # fmt: skip
        save(values)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--cache-mib", type=float, default=8, help="bound of each cache")
    parser.add_argument("--json", type=Path, help="instead of benchmarks/results/rss.json")
    args = parser.parse_args()
    save = result_file(args.json, "rss", measured=True)
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.requests, args.cache_mib, Path(folder), save)
    first, last = found["rss_mib"][0], found["rss_mib"][-1]
    print(f"{last[0]} requests: {first[1]} to {last[1]} MiB")
    print(f"second half: {found['kib_per_request_second_half']} KiB a request")


if __name__ == "__main__":
    main()
