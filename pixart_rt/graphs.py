"""CUDA graphs of a run on tensors, each kept for its shapes: the denoising loop, the text encoder.

A graph replays the launches that were captured, on the addresses they had. So it has inputs of its
own, into which a request's are copied, and a key that names everything else that a captured launch
depends on: shapes, dtypes, the loop's pattern of steps, and the version of the weights. A key that
was not captured has no graph; nothing is captured unless asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

GRAPH_BYTES = 1 << 32  # of all graphs that one `Graphs` keeps, their memory pools included


class Inputs(Protocol):
    """All that a run depends on but the weights: tensors by name, and perhaps more."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own, in a fixed order."""
        ...

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same with other tensors of these names."""
        ...


InputsT = TypeVar("InputsT", bound=Inputs)


class Captured(Protocol):
    """A recorded run: `replay` writes its output anew."""

    output: Tensor
    num_bytes: int

    def replay(self) -> None: ...


Capture = Callable[[Callable[[Any], Tensor], Any], Captured]


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Two requests with equal keys are the same launches on other values."""

    weights: Hashable  # the component and its version: changes whenever a weight does
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    pattern: Hashable = ()  # whatever else decides which launches there are

    @classmethod
    def of(cls, inputs: Inputs, weights: Hashable, pattern: Hashable = ()) -> GraphKey:
        """The key of a request's inputs for the present weights."""
        tensors = inputs.tensors().items()
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in tensors)
        return cls(weights, shapes, pattern)


@dataclass(frozen=True, slots=True)
class _Entry:
    tensors: dict[str, Tensor]  # the graph's own
    captured: Captured
    num_bytes: int


class Graphs(Generic[InputsT]):
    """Captured runs by key, the latest used up to a number of bytes. Serves one thread."""

    def __init__(self, capture: Capture | None = None, max_bytes: int = GRAPH_BYTES) -> None:
        self._capture = capture or CudaGraph
        self.max_bytes = max_bytes
        self.replays = self.captures = 0
        self._kept: OrderedDict[GraphKey, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._kept

    def capture(self, key: GraphKey, run: Callable[[InputsT], Tensor], inputs: InputsT) -> None:
        """Record `run` for this key. Graphs of older weights go first, then the least used."""
        for old in [kept for kept in self._kept if kept.weights != key.weights]:
            del self._kept[old]
        with torch.inference_mode(False):  # a replay outside inference mode may write to them too
            own = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
        captured = self._capture(run, inputs.with_tensors(own))
        size = captured.num_bytes + sum(tensor.nbytes for tensor in own.values())
        self._kept[key] = _Entry(own, captured, size)
        self._kept.move_to_end(key)
        self.captures += 1
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def replay(self, key: GraphKey, inputs: InputsT) -> Tensor | None:
        """The output for these inputs, or None where nothing was captured for the key."""
        entry = self._kept.get(key)
        if entry is None:
            return None
        self._kept.move_to_end(key)
        for name, value in inputs.tensors().items():
            entry.tensors[name].copy_(value, non_blocking=True)
        entry.captured.replay()
        self.replays += 1
        return entry.captured.output.clone()  # the next replay writes over it

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._kept.values())


class CudaGraph:
    """One run captured by torch.cuda.graph, after warm-up runs on a side stream."""

    WARM_UP = 2  # compilers and libraries allocate in the first runs

    def __init__(self, run: Callable[[InputsT], Tensor], inputs: InputsT) -> None:
        device = next(iter(inputs.tensors().values())).device
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
