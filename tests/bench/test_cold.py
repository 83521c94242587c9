"""A fresh process: its phases, its memory, and how its failure is told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.bench.cold import cold_start, request_from
from pixart_rt.bench.request import BenchRequest
from pixart_rt.errors import BackendError


def test_a_request_survives_its_json() -> None:
    for request in (
        BenchRequest(bundle=Path("a/b")),
        BenchRequest(bundle=Path("a"), batches=(2, 1), peers=("diffusers",), threads=3, warmup=2,
                     peer_model=Path("c"), prompt="ein Krëis", min_psnr=12.5, cold=False),
    ):  # fmt: skip
        assert request_from(json.loads(json.dumps(asdict(request), default=str))) == request


def test_phases_add_up_and_memory_is_the_childs_own(bundle_256: Path) -> None:
    ballast = bytearray(3 << 29)  # the parent's memory is not the child's, though it was forked
    ballast[:: 1 << 12] = b"x" * (len(ballast) >> 12)
    found = cold_start("pixart_rt", BenchRequest(bundle=bundle_256, steps=1, threads=1))
    del ballast
    phases = [found[name] for name in ("imports_s", "load_s", "first_image_s")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) == pytest.approx(found["total_s"])
    assert 1 << 27 < found["peak_memory"]["process"] < 3 << 29, "torch and a small model"


def test_a_failed_child_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"pixart_rt failed in a fresh process: .*not a bundle"):
        cold_start("pixart_rt", BenchRequest(bundle=tmp_path))


def test_importing_the_package_loads_no_torch() -> None:
    """What the child imports before its first mark is what a user's program imports."""
    code = "import pixart_rt.bench.cold, sys; print('torch' in sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
