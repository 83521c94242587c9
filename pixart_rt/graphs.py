"""The denoising loop as one CUDA graph, kept for each shape of request.

A graph replays the launches that were captured, on the addresses they had. So it has inputs of its
own, into which a request's are copied, and a key that names everything else that a captured launch
depends on: shapes, dtypes, schedule pattern, and the version of the weights. A key that was not
captured has no graph; nothing is captured unless asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pixart_rt.loop import LoopInputs

GRAPH_BYTES = 1 << 32  # of all graphs kept, their memory pools included

Run = Callable[[LoopInputs], Tensor]


class Captured(Protocol):
    """A recorded run: `replay` writes its output anew."""

    output: Tensor
    num_bytes: int

    def replay(self) -> None: ...


Capture = Callable[[Run, LoopInputs], Captured]


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Two requests with equal keys are the same launches on other values."""

    weights: Hashable  # changes whenever a weight does
    guides: tuple[bool, ...]
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    skips: tuple[int, ...] = ()  # the steps at which the model does not run

    @classmethod
    def of(cls, inputs: LoopInputs, weights: Hashable, skips: tuple[int, ...] = ()) -> GraphKey:
        """The key of a request's inputs for the present weights."""
        tensors = inputs.tensors().items()
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in tensors)
        return cls(weights, inputs.guides, shapes, skips)


@dataclass(frozen=True, slots=True)
class _Entry:
    inputs: LoopInputs
    captured: Captured
    num_bytes: int


class Graphs:
    """Captured loops by key, the latest used up to a number of bytes. Serves one thread."""

    def __init__(self, capture: Capture | None = None, max_bytes: int = GRAPH_BYTES) -> None:
        self._capture = capture or CudaGraph
        self.max_bytes = max_bytes
        self.replays = self.captures = 0
        self._kept: OrderedDict[GraphKey, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._kept

    def capture(self, key: GraphKey, run: Run, inputs: LoopInputs) -> None:
        """Record `run` for this key. Graphs of older weights go first, then the least used."""
        for old in [kept for kept in self._kept if kept.weights != key.weights]:
            del self._kept[old]
        own = inputs.with_tensors({name: t.clone() for name, t in inputs.tensors().items()})
        captured = self._capture(run, own)
        size = captured.num_bytes + sum(tensor.nbytes for tensor in own.tensors().values())
        self._kept[key] = _Entry(own, captured, size)
        self._kept.move_to_end(key)
        self.captures += 1
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def replay(self, key: GraphKey, inputs: LoopInputs) -> Tensor | None:
        """The output for these inputs, or None where nothing was captured for the key."""
        entry = self._kept.get(key)
        if entry is None:
            return None
        self._kept.move_to_end(key)
        mine = entry.inputs.tensors()
        for name, value in inputs.tensors().items():
            mine[name].copy_(value, non_blocking=True)
        entry.captured.replay()
        self.replays += 1
        return entry.captured.output.clone()  # the next replay writes over it

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._kept.values())


class CudaGraph:
    """One run captured by torch.cuda.graph, after warm-up runs on a side stream."""

    WARM_UP = 2  # compilers and libraries allocate in the first runs

    def __init__(self, run: Run, inputs: LoopInputs) -> None:
        device = inputs.x.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                run(inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        before = torch.cuda.memory_reserved(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = run(inputs)
        self.num_bytes = max(0, torch.cuda.memory_reserved(device) - before)

    def replay(self) -> None:
        """Queue the captured launches on the present stream."""
        self._graph.replay()
