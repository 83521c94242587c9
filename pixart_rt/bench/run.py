"""One measurement: cold starts, warm repetitions, limits of the machine; one JSON document."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pixart_rt.bench import counts
from pixart_rt.bench.agreement import worst
from pixart_rt.bench.cold import cold_start
from pixart_rt.bench.counts import Load, Product, Work
from pixart_rt.bench.gpu_lock import alone, compiler_waits
from pixart_rt.bench.measure import CACHED, NEW, Series, measure
from pixart_rt.bench.provenance import load_average, provenance
from pixart_rt.bench.request import MIN_PSNR, BenchRequest, Prompts, pipeline_folder
from pixart_rt.bench.roofline import Rates, better, floor, measure_rates
from pixart_rt.bench.systems import OURS, System, load_system
from pixart_rt.buckets import Bucket, bucket_for_aspect
from pixart_rt.bundle import Manifest
from pixart_rt.config import Precision
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_encoder import T5Config
from pixart_rt.model.tokenizer import PromptTokenizer

FORMAT = 1
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
Progress = Callable[[str, int, int], None]


def run(
    request: BenchRequest, command: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure. The document's keys are in docs/performance.md.

    command: what the document says it was made by; None is this process's command line.
    progress: called with what is next, how much is done and how much there is.
    Raises ConfigError for a request that its bundle cannot serve.
    """
    manifest = Manifest.read(request.bundle)
    request = request.checked(manifest)
    if request.warmup is None:
        request = replace(request, warmup=3 if torch.cuda.is_available() else 1)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    compiler_waits()
    load_before = load_average()
    names = (OURS, *request.peers)
    report = _Counted(progress, _work(request, names))
    with _empty_compile_cache():
        cold = _cold(names, request, report)
        systems = []
        for name in names:
            report(f"loading {name}")
            systems.append(load_system(name, request))
        device, dtype = systems[0].device, DTYPES[_precision(manifest)]
        with alone():  # loading, of twenty gigabytes perhaps, holds up no other benchmark
            report("the machine's limits")
            rates = measure_rates(device, dtype)
            series, found = _warm(systems, request, report)
            report("the machine's limits again")
            rates = better(rates, measure_rates(device, dtype))
    bound = request.min_psnr or MIN_PSNR[_precision(manifest)]
    bucket = bucket_for_aspect(int(manifest.engine_config["resolution"]), request.aspect_ratio)
    return {
        "format": FORMAT,
        **provenance(command),
        "load_average_at_start": load_before,
        "request": _request_facts(request, manifest, bucket, device),
        "systems": {
            system.name: {
                **system.facts(),
                "cold": cold.get(system.name),
                "series": [each.to_dict() for each in series if each.system is system],
            }
            for system in systems
        },
        "agreement": {name: worst(found[name], found[OURS], bound) for name in request.peers},
        "speedup": {name: speedup(series, name) for name in request.peers},
        "roofline": _roofline(request, manifest, bucket, rates),
    }


class _Counted:
    """Progress with its own count of steps."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)
        self._done += 1


def _work(request: BenchRequest, names: tuple[str, ...]) -> int:
    """How many times `report` is called."""
    assert request.warmup is not None
    images = (len(request.batches) * len(names) + 1) * (request.repeats + request.warmup)
    preparing = len(request.batches) * len(names)
    return len(names) * (2 if request.cold else 1) + 2 + preparing + images


@contextmanager
def _empty_compile_cache() -> Iterator[None]:
    """torch.compile starts from nothing, so that its time is what a first user sees."""
    before = os.environ.get(COMPILE_CACHE)
    with tempfile.TemporaryDirectory(prefix="pixart_rt-bench-") as folder:
        os.environ[COMPILE_CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[COMPILE_CACHE]
            else:
                os.environ[COMPILE_CACHE] = before


def _cold(
    names: tuple[str, ...], request: BenchRequest, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    found = {}
    if request.cold:
        for name in names:
            report(f"{name} in a fresh process")
            found[name] = cold_start(name, request)
    return found


def _warm(
    systems: list[System], request: BenchRequest, report: Callable[[str], None]
) -> tuple[list[Series], dict[str, list[dict[str, float]]]]:
    """All series, batch by batch, and the differences of the peers' images from ours."""
    assert request.warmup is not None
    prompts = Prompts(request.prompt)
    done: list[Series] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, *request.peers)}
    for batch in request.batches:
        series = [Series(system, NEW, batch) for system in systems]
        if batch == request.batches[0]:
            series.append(Series(systems[0], CACHED, batch))
        pairs = measure(
            series, prompts, request.seed, request.repeats, request.warmup,
            partial(_report_batch, report, batch),
        )  # fmt: skip
        for name, differences in pairs.items():
            found[name] += differences
        done += series
    return done, found


def _report_batch(report: Callable[[str], None], batch: int, label: str) -> None:
    report(f"batch {batch}: {label}")


def speedup(series: list[Series], peer: str) -> dict[str, float]:
    """The peer's time over ours, at the first batch size.

    `paired` is the median of the ratios within a repetition, which a slow drift of the machine
    leaves alone; `p50` the ratio of the medians; `cached` that against our cached prompt.
    """
    batch = series[0].batch
    mine, cached, theirs = (
        [
            sample["total"]
            for each in series
            if each.batch == batch and each.system.name == name and each.prompts == kind
            for sample in each.samples
        ]
        for name, kind in ((OURS, NEW), (OURS, CACHED), (peer, NEW))
    )
    pairs = [their / my for their, my in zip(theirs, mine, strict=True)]
    median = statistics.median
    return {
        "paired": median(pairs),
        "p50": median(theirs) / median(mine),
        "cached": median(theirs) / median(cached),
    }


def _precision(manifest: Manifest) -> Precision:
    return Precision(manifest.components["transformer"].precision)


def _request_facts(
    request: BenchRequest, manifest: Manifest, bucket: Bucket, device: torch.device
) -> dict[str, Any]:
    return {
        "bundle": str(request.bundle),
        "key": manifest.key,
        "model": manifest.model["name"],
        "weights": manifest.model.get("sha256"),
        "resolution": int(manifest.engine_config["resolution"]),
        "height": bucket.height,
        "width": bucket.width,
        "num_tokens": bucket.num_tokens,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": manifest.scheduler,
        "prompt": request.prompt,
        "seed": request.seed,
        "batches": list(request.batches),
        "repeats": request.repeats,
        "warmup": request.warmup,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }


def _roofline(
    request: BenchRequest, manifest: Manifest, bucket: Bucket, rates: Rates
) -> dict[str, Any]:
    """The machine's limits and the floors of one call at the first batch size."""
    batch = request.batches[0]
    tokenizer = PromptTokenizer(request.bundle / "tokenizer", manifest.config.max_text_tokens)
    tokens = tokenizer(Prompts(request.prompt).new(batch)).attention_mask
    load = Load(
        batch=batch,
        num_tokens=bucket.num_tokens,
        prompt_tokens=int(tokens.sum(1).max()),
        height=bucket.height,
        width=bucket.width,
        steps=request.steps,
        guided=request.sampling.guided,
    )
    folder = request.peer_model or pipeline_folder(manifest)
    floors = {
        work.value: floor(stage_products(manifest, folder, load, work), rates) for work in Work
    }
    return {
        "copy_tb_per_s": rates.copy_tb_per_s,
        "matmul_tflop_per_s": rates.matmul_tflop_per_s,
        "matmul_dtype": rates.dtype,
        "batch": batch,
        "prompt_tokens": load.prompt_tokens,
        "floors": floors,
    }


def stage_products(
    manifest: Manifest, folder: Path | None, load: Load, work: Work
) -> dict[str, list[Product] | None]:
    """The products of each stage of one call. None for text encoder and VAE decoder where the
    pipeline folder, which has their configurations, is not here.
    """
    config = manifest.config
    loop = counts.text_once(config, load, work) + [
        replace(product, times=product.times * load.steps)
        for product in counts.step(config, load, work)
    ]
    stages: dict[str, list[Product] | None] = {
        "text_encoder": None, "denoising": loop, "vae_decoder": None
    }  # fmt: skip
    if folder is not None:
        t5 = T5Config.read(folder / "text_encoder")
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        stages["text_encoder"] = counts.text_encoder(t5, load, config.max_text_tokens, work)
        stages["vae_decoder"] = counts.vae_decoder(vae, load)
    return stages
