"""Kernels run on a GPU if there is one, else in Triton's interpreter, on poisoned memory.

There every launch is also written down (launches.py), for test_launch_compiles.py, which runs last;
with PIXART_RT_LAUNCHES=FILE also into a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixart_rt.kernels.launch import interpreting
from tests.kernels.launches import Launches, written_down

LAST = "test_launch_compiles.py"


@pytest.fixture(scope="package", autouse=True)
def launches() -> Iterator[Launches]:
    """What the tests of this folder have launched so far."""
    found = Launches()
    with written_down(found):
        yield found
    if file := os.environ.get("PIXART_RT_LAUNCHES"):
        Path(file).write_text(json.dumps(found.sorted()))


@pytest.hookimpl(tryfirst=True)  # before pytest itself reads -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests of kernels run on it: `-m gpu` selects those with a device."""
    items.sort(key=lambda item: item.path.name == LAST)
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))  # see `poisoned`
        if torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here. Without a GPU and without the interpreter nothing would be tested."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert interpreting(), "triton was imported before tests/conftest.py set TRITON_INTERPRET"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that a kernel forgets to write is seen."""
    # With it, torch.empty fills with NaN. It also warns of references on a GPU, in cuBLAS too.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def error() -> Callable[[Tensor, Tensor], float]:
    """error(actual, expected): relative, in the Frobenius norm; NaN if an element is missing."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        difference = actual.detach().double().cpu() - expected.detach().double().cpu()
        return float(difference.norm() / expected.detach().double().norm())

    return measure


# Largest relative error of a result that is right up to rounding of inputs and outputs.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def tolerance() -> dict[torch.dtype, float]:
    return TOLERANCE
