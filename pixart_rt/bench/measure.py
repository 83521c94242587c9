"""Warm latencies of several systems, in turn, so that a machine's drift hits all alike.

A series is one system with one kind of prompt and one batch size. Repetition k gives every series
the same seeds and every new-prompt series the same prompts, which no system has seen before; who
begins rotates. Warm-up repetitions are not counted; the first call of a series is kept apart, for
it compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from pixart_rt.bench.agreement import differences
from pixart_rt.bench.request import Prompts
from pixart_rt.bench.stages import STAGES
from pixart_rt.bench.systems import OURS, System
from pixart_rt.bench.timing import in_turn

PERCENTILES = (50, 90, 99)
NEW, CACHED = "new", "cached"  # prompts never seen; the same prompt every time
Report = Callable[[str], None]


@dataclass(slots=True)
class Series:
    """The samples of one system, kind of prompt and batch size."""

    system: System
    prompts: str
    batch: int
    prepare: float = 0.0  # seconds
    first_call: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.system.name if self.prompts == NEW else f"{self.system.name}, cached prompt"

    def to_dict(self) -> dict[str, Any]:
        """Seconds of every repetition, percentiles and means; images a second at the median."""
        totals = [sample["total"] for sample in self.samples]
        steps = [step for sample in self.samples for step in sample["steps"]]
        summary = percentiles(totals)
        return {
            "batch": self.batch,
            "prompts": self.prompts,
            "prepare_s": self.prepare,
            "first_call_s": self.first_call,
            "latency_s": totals,
            **summary,
            "mean_s": float(np.mean(totals)),
            "images_per_s": self.batch / summary["p50_s"],
            "stages_s": {name: [sample[name] for sample in self.samples] for name in STAGES},
            "stages_mean_s": {
                name: float(np.mean([sample[name] for sample in self.samples])) for name in STAGES
            },
            "transformer_calls": len(steps) / len(self.samples),
            "transformer_call_s": percentiles(steps) if steps else None,
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50_s, p90_s and p99_s, linear between the samples."""
    return {f"p{q}_s": float(np.percentile(values, q)) for q in PERCENTILES}


def measure(
    series: list[Series], prompts: Prompts, seed: int, repeats: int, warmup: int, report: Report
) -> dict[str, list[dict[str, float]]]:
    """Fill series of one batch size with samples.

    Returns, for every peer, the differences of its images from ours at every repetition; and for
    ours, those from our own images of the repetition before, which have another prompt and seed.
    """
    batch = series[0].batch
    assert all(each.batch == batch for each in series)
    found: dict[str, list[dict[str, float]]] = {}
    for each in series:
        if each.prompts == NEW:
            report(f"{each.label}: preparing")
            started = time.perf_counter()
            each.system.prepare(batch)
            each.prepare = time.perf_counter() - started
    before: list[Any] | None = None
    for repetition, turn in groupby(in_turn(series, repeats, warmup), key=itemgetter(0)):
        texts = {NEW: prompts.new(batch), CACHED: prompts.cached(batch)}
        seeds = [seed + batch * (repetition + warmup) + k for k in range(batch)]
        images: dict[str, list[Any]] = {}
        for _, each in turn:
            report(each.label)
            made, sample = each.system(texts[each.prompts], seeds)
            if each.first_call is None:
                each.first_call = sample["total"]
            if repetition >= 0:
                each.samples.append(sample)
            if each.prompts == NEW:
                images[each.system.name] = made
        for name in images.keys() - {OURS}:
            found.setdefault(name, []).append(differences(images[OURS], images[name]))
        if before is not None:
            found.setdefault(OURS, []).append(differences(images[OURS], before))
        before = images[OURS]
    return found
