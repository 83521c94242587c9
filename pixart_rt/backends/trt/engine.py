"""A serialized TensorRT or TensorRT-RTX engine as a part of a component.

Work is queued on the caller's stream. The host waits only at load and, to write the runtime cache,
after the first run of a profile.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pixart_rt.backends.engine_files import one_line, ordered_on
from pixart_rt.backends.trt.arena import Arena
from pixart_rt.backends.trt.cache import RuntimeCache
from pixart_rt.backends.trt.plugins import failure
from pixart_rt.errors import BackendError, BundleError

DTYPES = {  # trt.DataType name -> torch
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}

Shapes = dict[str, tuple[int, ...]]
Profile = dict[str, tuple[tuple[int, ...], ...]]  # input -> (min, opt, max) shape


class Engine:
    """A deserialized engine with one execution context per profile. Serves one thread.

    The contexts work in the arena, which other engines share: only one runs at a time.
    cuda_graphs: the library captures each shape's run and replays it (TensorRT-RTX only).
    """

    def __init__(
        self,
        trt: ModuleType,
        path: Path,
        arena: Arena,
        cache: RuntimeCache | None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        self._trt, self._path, self._cache = trt, path, cache
        self._arena, self._stream, self._device = arena, arena.stream, arena.device
        if cuda_graphs and not hasattr(trt, "CudaGraphStrategy"):
            raise BackendError(
                f"CUDA graphs were requested, but {trt.__name__} {trt.__version__} has none of its "
                "own; leave them out, or build with --backend tensorrt-rtx"
            )
        self._cuda_graphs = cuda_graphs
        with torch.cuda.device(self._device):
            self._runtime, self._engine = deserialize(trt, path)
            self._read_bindings()
            self._contexts = [self._create_context(index) for index in range(len(self.profiles))]
            arena.admit(self, self.activation_bytes)
        self._warm: set[int] = set()  # profiles that have run: their kernels are in the cache

    def _read_bindings(self) -> None:
        engine = self._engine
        inputs: list[str] = []
        outputs: list[str] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if is_input else outputs).append(name)
        if len(outputs) != 1:
            raise BundleError(f"{self._path} has outputs {outputs} instead of one; build it again")
        self._output = outputs[0]
        self.input_names = tuple(inputs)
        self.dtypes = {
            name: DTYPES[engine.get_tensor_dtype(name).name] for name in (*inputs, *outputs)
        }
        self.profiles: list[Profile] = [
            {
                name: tuple(tuple(s) for s in engine.get_tensor_profile_shape(name, index))
                for name in inputs
            }
            for index in range(engine.num_optimization_profiles)
        ]

    def _create_context(self, profile: int) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None and not self._cuda_graphs:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self._cache is not None:
                self._cache.attach(config)
            if self._cuda_graphs:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        if context is None and (reason := failure()):
            raise BackendError(f"no execution context for {self._path}: {reason}")
        if context is None:
            raise BackendError(
                f"no execution context for {self._path}; free GPU memory, or build with a smaller "
                "--max-batch"
            )
        context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        self._stream.synchronize()  # once, at load
        return context

    @property
    def activation_bytes(self) -> int:
        """Bytes of the arena that it needs, for the largest of its profiles."""
        return int(self._engine.device_memory_size_v2)

    def use_memory(self, address: int, size: int) -> None:
        """Move all contexts to another place of the arena."""
        for context in self._contexts:
            context.set_device_memory(address, size)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        bound = {
            name: tensor.to(self._device, self.dtypes[name]).contiguous()
            for name, tensor in inputs.items()
        }
        profile = fitting_profile(
            self.profiles, {name: tuple(tensor.shape) for name, tensor in bound.items()}
        )
        context = self._contexts[profile]
        with torch.cuda.device(self._device):
            for name, tensor in bound.items():
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            shape = tuple(context.get_tensor_shape(self._output))
            output = torch.empty(shape, dtype=self.dtypes[self._output], device=self._device)
            context.set_tensor_address(self._output, output.data_ptr())
            self._execute(context, [*bound.values(), output])
            self._keep_kernels(profile)
        return output.float()

    def _keep_kernels(self, profile: int) -> None:
        """After a profile's first run, write its compiled kernels to disk. The only host wait."""
        if profile not in self._warm:
            self._warm.add(profile)
            if self._cache is not None:
                torch.cuda.current_stream(self._device).synchronize()
                self._cache.save()

    def _execute(self, context: Any, tensors: list[Tensor]) -> None:
        present = torch.cuda.current_stream(self._device)
        if present.cuda_stream != 0:
            self._arena.take(present)
            done = context.execute_async_v3(present.cuda_stream)
        else:
            with ordered_on(self._stream, tensors):
                self._arena.take(self._stream)
                done = context.execute_async_v3(self._stream.cuda_stream)
        if not done and (reason := failure()):
            raise BackendError(reason)
        if not done:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise BackendError(f"the engine {self._path} refused to run with shapes {shapes}")


def deserialize(trt: ModuleType, path: Path) -> tuple[Any, Any]:
    """The runtime and the engine of a file; the engine is valid while the runtime lives."""
    log = error_log(trt)
    runtime = trt.Runtime(log)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        reason = one_line(log.errors[0]) if log.errors else "no reason given"
        raise BundleError(
            f"{trt.__name__} {trt.__version__} cannot load {path}: {reason}; the file is damaged "
            "or from another version or GPU: build the bundle again"
        )
    return runtime, engine


def error_log(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors in `.errors` and drops the rest."""

    class ErrorLog(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()


def fitting_profile(profiles: list[Profile], shapes: Shapes) -> int:
    """The profile that holds all shapes; of several, the one tuned for the nearest shapes."""

    def fits(profile: Profile) -> bool:
        return all(
            len(shape) == len(profile[name][0])
            and all(
                low <= size <= high
                for size, low, high in zip(shape, profile[name][0], profile[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    def distance(index: int) -> int:
        return sum(
            abs(size - tuned)
            for name, shape in shapes.items()
            for size, tuned in zip(shape, profiles[index][name][1], strict=True)
        )

    fitting = [index for index, profile in enumerate(profiles) if fits(profile)]
    if not fitting:
        raise BackendError(_misfit(profiles, shapes))
    return min(fitting, key=distance)


def _misfit(profiles: list[Profile], shapes: Shapes) -> str:
    asked, accepted = [], []
    for name, shape in shapes.items():
        ranges = [(profile[name][0], profile[name][2]) for profile in profiles]
        if not all(_inside(shape, low, high) for low, high in ranges):
            asked.append(f"{name} {list(shape)}")
            accepted += [f"{name} {list(low)} to {list(high)}" for low, high in ranges]
    return (
        f"the engine has no profile for {', '.join(asked)}; it accepts {' or '.join(accepted)}: "
        "ask for a size and batch within these, or build with a larger --max-batch"
    )


def _inside(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return len(shape) == len(low) and all(
        a <= size <= b for size, a, b in zip(shape, low, high, strict=True)
    )
