"""The one loop that times: who is called when, what is counted, by which clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pixart_rt.bench import gpu_lock
from pixart_rt.bench.timing import (
    between,
    elapsed,
    elapsed_by,
    in_turn,
    median_seconds,
    samples,
    seconds_per_call,
)

CPU = torch.device("cpu")


def test_every_repetition_begins_with_another() -> None:
    assert list(in_turn("abc", repeats=2, warmup=1)) == [
        (-1, "c"), (-1, "a"), (-1, "b"), (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"),
    ]  # fmt: skip


def test_samples_leave_the_warm_up_out_and_hold_the_lock() -> None:
    called: list[str] = []
    ticks = iter(range(100))

    def clock(call: Callable[[], Any]) -> float:
        call()
        return float(next(ticks))

    def call(name: str) -> None:
        assert gpu_lock._turn.depth == 1, "no other benchmark times meanwhile"
        called.append(name)

    calls = {name: partial(call, name) for name in "ab"}
    found = samples(calls, clock, repeats=2, warmup=1)
    assert called == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [2.0, 5.0], "b": [3.0, 4.0]}
    assert gpu_lock._turn.depth == 0


def test_a_clock_sees_the_call_alone() -> None:
    ticks = iter((10.0, 13.5))
    assert elapsed_by(lambda: next(ticks), lambda: None) == 3.5
    assert between(1.0, 3.0) == 2.0
    assert elapsed(lambda: None, CPU) >= 0


def test_the_median_is_of_the_counted_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((99.0, 1.0, 5.0, 2.0))
    monkeypatch.setattr("pixart_rt.bench.timing.elapsed", lambda call, device: next(seconds))
    assert median_seconds(lambda: None, CPU, repeats=3, warmup=1) == 2.0


def test_without_a_gpu_a_call_is_timed_on_the_first_inputs() -> None:
    seen: list[int] = []
    sets = [(torch.ones(1), 1), (torch.ones(1), 2)]
    assert seconds_per_call(lambda x, number: seen.append(number), sets) >= 0
    assert seen == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_a_gpu_is_timed_in_device_time(graph: bool) -> None:
    x = torch.randn(4096, 4096, device="cuda")
    assert seconds_per_call(torch.mm, [(x, x)], graph=graph) > 1e-5, "137 GFLOP"
