"""Captured loops: a graph is replayed for equal keys only, and never after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixart_rt.inference.cuda_graphs import GraphKey, Graphs
from pixart_rt.inference.token_loop import LoopInputs, TextInputs


class Recorded:
    """What a CUDA graph does, on the CPU: it knows only the tensors that it was made with."""

    made = 0

    def __init__(self, run: Any, inputs: LoopInputs) -> None:
        Recorded.made += 1
        self._run, self._inputs = run, inputs
        self.output = run(inputs)
        self.num_bytes = 1000

    def replay(self) -> None:
        self.output.copy_(self._run(self._inputs))


def text(rows: int, length: int) -> TextInputs:
    return TextInputs(
        null_rows=torch.arange(0),
        text_rows=torch.arange(rows),
        constant=torch.zeros(2, 0, 1, 4),
        prompt_mask=torch.ones(rows, length, dtype=torch.bool),
        text_kv=torch.randn(2, rows, length, 2, 1, 4),
    )


def inputs(tokens: int = 6, steps: int = 2, length: int = 5, guided: bool = True) -> LoopInputs:
    return LoopInputs(
        x=torch.randn(1, tokens, 16),
        pos_embed=torch.randn(1, tokens, 4),
        modulation=torch.randn(steps, 1, 7, 4),
        coefficients=torch.randn(steps, 1, 8),
        outputs=torch.arange(16),
        plain=text(1, length),
        guided=text(2, length) if guided else None,
        guides=(guided,) * steps,
    )


def run(values: LoopInputs) -> torch.Tensor:
    """Depends on every tensor, as the loop does."""
    return values.x + sum(t.double().sum() for t in values.tensors().values()).float()


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(capture=Recorded)


def test_a_replay_uses_the_new_values(graphs: Graphs) -> None:
    first, second = inputs(), inputs()
    key = GraphKey.of(first, 0)
    assert graphs.replay(key, first) is None, "nothing is captured unless asked"
    graphs.capture(key, run, first)
    for values in (second, first):
        out = graphs.replay(GraphKey.of(values, 0), values)
        assert out is not None
        torch.testing.assert_close(out, run(values))
    assert (graphs.captures, graphs.replays) == (1, 2)


def test_an_output_outlives_the_next_replay(graphs: Graphs) -> None:
    first, second = inputs(), inputs()
    graphs.capture(GraphKey.of(first, 0), run, first)
    out = graphs.replay(GraphKey.of(first, 0), first)
    graphs.replay(GraphKey.of(second, 0), second)
    torch.testing.assert_close(out, run(first))


@pytest.mark.parametrize(
    "changed",
    [{"tokens": 7}, {"steps": 3}, {"length": 16}, {"guided": False}, {"weights": 1}, {"dtype": 1}],
    ids=lambda changed: next(iter(changed)),
)
def test_another_shape_schedule_or_weight_has_no_graph(
    graphs: Graphs, changed: dict[str, Any]
) -> None:
    values = inputs()
    graphs.capture(GraphKey.of(values, 0), run, values)
    weights = changed.pop("weights", 0)
    other = inputs(**{k: v for k, v in changed.items() if k != "dtype"})
    if "dtype" in changed:
        other = other.with_tensors({k: v.double() for k, v in other.tensors().items()})
    assert graphs.replay(GraphKey.of(other, weights), other) is None


def test_a_captured_weight_version_replaces_the_older(graphs: Graphs) -> None:
    values = inputs()
    graphs.capture(GraphKey.of(values, "old"), run, values)
    graphs.capture(GraphKey.of(values, "new"), run, values)
    assert len(graphs) == 1 and GraphKey.of(values, "new") in graphs


def test_the_least_used_go_beyond_the_bound() -> None:
    shapes = [inputs(tokens=n) for n in (4, 5, 6)]
    keys = [GraphKey.of(values, 0) for values in shapes]
    size = 1000 + sum(t.nbytes for t in shapes[-1].tensors().values())
    graphs = Graphs(capture=Recorded, max_bytes=2 * size)
    graphs.capture(keys[0], run, shapes[0])
    graphs.capture(keys[1], run, shapes[1])
    assert graphs.replay(keys[0], shapes[0]) is not None  # now the second is the least used
    graphs.capture(keys[2], run, shapes[2])
    assert [key in graphs for key in keys] == [True, False, True]
    assert graphs.num_bytes <= 2 * size
