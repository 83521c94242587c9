"""A measurement of the random 256 px bundle compared with diffusers, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt.bench.request import BenchRequest


@pytest.fixture(scope="session")
def measured(bundle_256: Path) -> dict[str, Any]:
    """Batches 2 and 1, three repetitions of two steps, without fresh processes."""
    from pixart_rt.bench.run import run

    request = BenchRequest(
        bundle=bundle_256, aspect_ratio="2:1", steps=2, seed=5, batches=(2, 1), repeats=3,
        warmup=1, peers=("diffusers",), cold=False, threads=torch.get_num_threads(),
    )  # fmt: skip
    return run(request, "the command")
