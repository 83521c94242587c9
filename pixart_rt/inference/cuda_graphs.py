"""CUDA graphs of a run on tensors, each kept for its shapes: the denoising loop, the text encoder.

A graph replays the launches that were captured, on the addresses they had. So it has inputs of its
own, into which a request's are copied, and a key that names everything else that a captured launch
depends on: shapes, dtypes, the loop's pattern of steps, and the version of the weights.

A key is captured when `capture` is called (`warmup`) or, with `automatic`, inside the second
request that asks for it: the first may be the only one of its shape, and its run compiles and loads
what is compiled and loaded at first use. The second runs once more, to warm up the stream of
captures, then captures, and is answered by the first replay. A key whose capture failed, or whose
graph was evicted, is not captured automatically again: more shapes than fit would otherwise be
captured in turn for ever.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from pixart_rt.inference.lru import Lru

GRAPH_BYTES = 1 << 32  # of all graphs that one `Graphs` keeps, their memory pools included
MAX_SEEN = 256  # keys remembered; 40 buckets with four forms of the text are 160
NEVER = math.inf  # the request before which a key must have been asked: it never is


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
    """Captured runs by key, the latest used up to a number of bytes. Serves one thread at a time:
    a graph has one set of inputs.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        max_bytes: int = GRAPH_BYTES,
        *,
        automatic: bool = False,
    ) -> None:
        """automatic: `recall` captures the keys that a second request asks for."""
        self._capture = capture or CudaGraph
        self.automatic = automatic
        self.replays = self.captures = 0
        self._kept: Lru[GraphKey, _Entry] = Lru(lambda entry: entry.num_bytes, max_bytes=max_bytes)
        # The first request of each key.
        self._seen: Lru[GraphKey, float] = Lru(max_entries=MAX_SEEN)
        self._request = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[GraphKey]:
        return iter(self._kept)

    def begin(self) -> None:
        """A new request begins: from now on keys of the earlier ones may be captured."""
        self._request += 1

    def capture(self, key: GraphKey, run: Callable[[InputsT], Tensor], inputs: InputsT) -> None:
        """Record `run` for this key, whose launches have run before. Graphs of older weights go
        first, then the least used.
        """
        self._kept.remove(lambda kept: kept.weights != key.weights)
        own = {name: _copy(tensor) for name, tensor in inputs.tensors().items()}
        captured = self._capture(run, inputs.with_tensors(own))
        size = captured.num_bytes + sum(tensor.nbytes for tensor in own.values())
        self._seen.remove(lambda seen: seen == key)
        self.captures += 1
        for evicted in self._kept.put(key, _Entry(own, captured, size)):
            self._seen.put(evicted, NEVER)

    def replay(self, key: GraphKey, inputs: InputsT) -> Tensor | None:
        """The output for these inputs, or None where nothing was captured for the key."""
        entry = self._kept.get(key)
        if entry is None:
            return None
        with torch.inference_mode():  # where tensors of either kind may be written to
            for name, value in inputs.tensors().items():
                entry.tensors[name].copy_(value, non_blocking=True)
            entry.captured.replay()
        self.replays += 1
        return entry.captured.output.clone()  # the next replay writes over it

    def recall(
        self, key: GraphKey, run: Callable[[InputsT], Tensor] | None, inputs: InputsT
    ) -> Tensor | None:
        """As `replay`; with `automatic`, a key that an earlier request asked for is captured first.

        run: None where no graph can hold it. The result is None where there is no graph: then the
        caller runs the launches itself. A capture that fails is warned of once.
        """
        may_capture = self.automatic and run is not None and key not in self._kept
        if may_capture and self._is_repeated(key):
            assert run is not None
            try:
                self.capture(key, run, inputs)
            except Exception as error:  # out of memory, or an operator that no graph can hold
                self._seen.put(key, NEVER)
                _warn(error)
        return self.replay(key, inputs)

    @property
    def num_bytes(self) -> int:
        return self._kept.num_bytes

    @property
    def max_bytes(self) -> float:
        """The bound, which holds from the next capture on."""
        return self._kept.max_bytes

    @max_bytes.setter
    def max_bytes(self, bound: float) -> None:
        self._kept.max_bytes = bound

    @property
    def num_seen(self) -> int:
        """Keys that are remembered without a graph, at most MAX_SEEN."""
        return len(self._seen)

    def _is_repeated(self, key: GraphKey) -> bool:
        """True where an earlier request asked for this key, and it may be captured. Notes it."""
        # A key holds its component, whose weights would stay in memory.
        self._seen.remove(lambda seen: seen.weights != key.weights)
        first = self._seen.get(key)
        if first is None:
            first = self._request
            self._seen.put(key, first)
        return first < self._request


def _copy(tensor: Tensor) -> Tensor:
    """A copy of its kind: torch.compile compiles again for tensors of inference mode."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.clone()


def _warn(error: BaseException) -> None:
    # An error inside a capture makes its end fail too; the first one says why.
    while error.__cause__ is None and error.__context__ is not None:
        error = error.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    warnings.warn(
        "a CUDA graph could not be captured when its shape was requested for a second time "
        f"({type(error).__name__}: {lines[0] if lines else 'no reason given'}); requests of this "
        "shape run without one from now on. Load with auto_capture=False to try none",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream of all captures on a device: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """One run captured by torch.cuda.graph, after warm-up runs on a side stream.

    All of it happens on the inputs' device, which need not be the current one: torch.cuda.graph
    synchronizes, empties the cache of and, by default, records a stream of the current device.
    """

    # Compilers and libraries allocate in the first runs, libraries once for each stream. Whoever
    # captures has run the launches before, on the present stream.
    WARM_UP = 1

    def __init__(self, run: Callable[[InputsT], Tensor], inputs: InputsT) -> None:
        self._device = next(iter(inputs.tensors().values())).device
        with torch.cuda.device(self._device):
            present = torch.cuda.current_stream(self._device)
            try:
                self._capture(run, inputs, present)
            except Exception:
                # torch.cuda.graph leaves its stream current where the end of a capture fails, and
                # the stream may be in no state for another.
                torch.cuda.set_stream(present)
                _capture_stream.cache_clear()
                raise

    def _capture(
        self, run: Callable[[InputsT], Tensor], inputs: InputsT, present: torch.cuda.Stream
    ) -> None:
        stream = _capture_stream(self._device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                run(inputs)
        present.wait_stream(stream)
        # What the warm-up left in the allocator's cache goes now, as it would when torch.cuda.graph
        # begins; else the difference below would lack it.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads allocate or copy meanwhile must not break the capture.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self.output = run(inputs)
        self.num_bytes = max(0, torch.cuda.memory_reserved(self._device) - before)

    def replay(self) -> None:
        """Queue the captured launches on the device's present stream."""
        with torch.cuda.device(self._device):
            self._graph.replay()
