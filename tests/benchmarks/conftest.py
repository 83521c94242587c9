"""`benchmarks` is a folder of the checkout, not of the package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import pixart_rt

CHECKOUT = Path(pixart_rt.__file__).parents[1]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """benchmark_module("gpu.pool") is benchmarks.gpu.pool."""
    monkeypatch.syspath_prepend(str(CHECKOUT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")
