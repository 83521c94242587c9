"""What all backends share: finding a component's engines, running them in order, streams.

A component is one or more parts. Part 0 takes the component's inputs; each later part takes the
previous output as `hidden`, and whichever of the component's inputs it names (a split text encoder:
attention_mask). The last part gives the component's output.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pixart_rt.backends.architectures import check_architecture
from pixart_rt.bundle import ComponentEntry, Manifest
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.model.signature import ABSORBED, CONTROLNET, SIGNATURES

HIDDEN = "hidden"  # the input of a later part that takes the previous part's output


class Part(Protocol):
    """One engine: the tensors it names in, one float32 tensor out."""

    input_names: tuple[str, ...]

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor: ...


class Chain:
    """A component made of parts that run one after the other."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        also_takes: frozenset[str] = frozenset(),
        module: torch.nn.Module | None = None,
        capturable: bool = False,
        cacheable: Callable[..., Tensor] | None = None,
    ) -> None:
        """module: the one whose weights the parts read while they run, if there is one.
        capturable: whether a CUDA graph may hold the launches: PyTorch's allocator, no host waits.
        cacheable: the transformer with the further argument `cache` (model/transformer.py), where
            it is no engine, which cannot stop after its first block.
        """
        self.name = name
        self.parts = tuple(parts)
        self.also_takes = also_takes
        self.capturable = capturable
        self.cacheable = cacheable
        self._module = module

    def version(self) -> Hashable:
        """Changes whenever a weight is written or replaced. Engines cannot change."""
        if self._module is None:
            return 0
        tensors = (*self._module.parameters(), *self._module.buffers())
        return hash(tuple((tensor.data_ptr(), tensor._version) for tensor in tensors))

    def __call__(self, **inputs: Tensor) -> Tensor:
        for part in self.parts:
            try:
                given = self.also_takes & inputs.keys()
                names = _with_absorbed(part.input_names) if given else part.input_names
                wanted = {name: inputs[name] for name in names}
            except KeyError as missing:
                raise BackendError(
                    f"the {self.name} needs the input {missing}, it was called with "
                    f"{sorted(inputs)}; pass {', '.join(SIGNATURES[self.name].names())}"
                ) from missing
            output = part(wanted)
            inputs[HIDDEN] = output
        return output


def _with_absorbed(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*(name for name in names if name != "text_kv"), *ABSORBED)


class FunctionPart:
    """A part around a callable that takes keyword tensors, as PyTorch's modules do."""

    def __init__(self, function: Callable[..., Tensor], input_names: tuple[str, ...]) -> None:
        self._function = function
        self.input_names = input_names

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        # Not inference_mode: its tensors could never be used in a caller's own autograd graph.
        with torch.no_grad():
            return self._function(**inputs)


def part_inputs(name: str, index: int, *, controlled: bool = False) -> tuple[str, ...]:
    """The inputs of part `index` of component `name`, where the engine does not name its own.

    `controlled`: the bundle has a ControlNet.
    """
    names = SIGNATURES[name].names(*((CONTROLNET,) if controlled else ()))
    return names if index == 0 else (HIDDEN, *names[1:])


def forms_of(name: str) -> frozenset[str]:
    """The other inputs that PyTorch's modules take, whose graph is not fixed."""
    return frozenset(ABSORBED if name == "transformer" else ())


def entry_of(bundle: Path, manifest: Manifest, name: str) -> ComponentEntry:
    """The manifest's entry of a component, or a BundleError that says what the bundle has."""
    entry = manifest.components.get(name)
    if entry is None:
        raise BundleError(
            f"{bundle} has no {name}, only {', '.join(manifest.components) or 'nothing'}; "
            f"build it again with {name} among its --components"
        )
    if not entry.parts:
        raise BundleError(f"{bundle}: its manifest lists no engine for {name}; build it again")
    return entry


def engine_paths(bundle: Path, manifest: Manifest, name: str) -> list[Path]:
    """The engine files of a component, in the order they run. All exist and are not empty."""
    paths = [Path(bundle) / part for part in entry_of(bundle, manifest, name).parts]
    for path in paths:
        if not path.is_file() or path.stat().st_size == 0:
            found = "is empty" if path.is_file() else "is missing"
            raise BundleError(f"the engine {path} {found}; build the bundle again")
    return paths


def check_device(device: torch.device) -> None:
    """A BackendError when a CUDA device is asked that PyTorch does not have, or no kernels for."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"the device {device} was requested, but PyTorch {torch.__version__} finds no NVIDIA "
            "GPU; use the device cpu, or see `pixart-rt doctor`"
        )
    check_architecture(device)


def one_line(error: object) -> str:
    """The first line of an error that says something, for our own one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the block, whatever the block does to that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> str:
    """The compute capability of a CUDA device, as targets are written: sm89."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@contextmanager
def ordered_on(stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Work queued on `stream` inside the block runs after the present stream's, and before its
    next. The host does not wait. `tensors` are those the block uses; they may be freed after it.
    """
    present = torch.cuda.current_stream(stream.device)
    stream.wait_stream(present)
    try:
        yield
    finally:
        present.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(stream)
