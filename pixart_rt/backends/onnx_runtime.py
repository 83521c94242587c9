"""ONNX Runtime: the CPU everywhere, CUDA (and, if asked, TensorRT) on a GPU.

Inputs and outputs are torch tensors bound by their address, on both kinds of device; only an
output whose shape the inputs do not name (the VAE's image) is copied once, on the device. On a GPU
the session runs on a stream of its own, ordered with the caller's by events; the host does not
wait.

The CUDA provider's enable_cuda_graph stays off: it replays the shapes and addresses that it
captured, and here every call brings tensors of its own, of any bucket's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.backends.component import Availability, Component
from pixart_rt.backends.engine_files import (
    Chain,
    Part,
    check_device,
    current,
    engine_paths,
    one_line,
    ordered_on,
)
from pixart_rt.bundle import Manifest
from pixart_rt.errors import BackendError, BundleError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
FATAL = 4  # log severity: errors come back as exceptions, and only there
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
ONNX_TYPES = {  # TensorProto.DataType
    torch.float32: 1,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}


class OnnxRuntimeBackend:
    """ONNX graphs, run by the provider of the device. `tensorrt` prefers the TensorRT provider,
    which compiles an engine at the first call of each shape range, on the machine that runs it.
    """

    def __init__(self, *, tensorrt: bool = False) -> None:
        self.name = "onnxruntime-tensorrt" if tensorrt else "onnxruntime"
        self._tensorrt = tensorrt

    def available(self) -> Availability:
        try:
            import onnxruntime
        except ImportError as error:
            return Availability(False, one_line(error), "pip install onnxruntime")
        version = f"onnxruntime {onnxruntime.__version__}"
        if self._tensorrt:
            return _tensorrt_available(version)
        if not torch.cuda.is_available():
            return Availability(True, f"{version} on the CPU")
        if has_cuda():
            return Availability(True, f"{version} on {torch.cuda.get_device_name()}")
        return Availability(
            True,
            f"{version} on the CPU; it has no CUDA provider for the GPU",
            "pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        check_device(device)
        paths = engine_paths(bundle, manifest, name)
        stream = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            device = stream.device  # "cuda" gains its index
        return Chain(name, [self._load_part(path, device, stream) for path in paths])

    def _load_part(
        self, path: Path, device: torch.device, stream: torch.cuda.Stream | None
    ) -> Part:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        providers = self._providers(device, stream)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = torch.get_num_threads()
        # Between calls torch needs the cores, and threads that spin for work would take them: a
        # 6-layer step of 256 tokens takes 144 ms without spinning, 412 ms with it (medians beside
        # small torch products, two cores shared with other work, November 2026).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            with current(device):  # its providers make their own device current and leave it so
                session = onnxruntime.InferenceSession(
                    path, options, providers=[*providers], provider_options=[*providers.values()]
                )
        except native.NotImplemented as error:
            raise BackendError(
                f"ONNX Runtime cannot run {path} on {device}: {one_line(error)}; "
                "build it with another precision"
            ) from error
        except Exception as error:  # each of its errors has a class of its own, below Exception
            raise BundleError(
                f"the engine {path} is damaged or not for this ONNX Runtime "
                f"({one_line(error)}); build the bundle again"
            ) from error
        first = next(iter(providers))
        if session.get_providers()[0] != first:  # it falls back to the CPU without an error
            raise BackendError(
                f"ONNX Runtime could not start {first} for {path} and has only "
                f"{session.get_providers()}; install the CUDA and cuDNN versions it needs"
            )
        return _OrtPart(session, path, device, stream)

    def _providers(
        self, device: torch.device, stream: torch.cuda.Stream | None
    ) -> dict[str, dict[str, str]]:
        """Provider -> options, the preferred first."""
        import onnxruntime

        if stream is None:
            return {CPU: {}}
        installed = onnxruntime.get_available_providers()
        wanted = [TENSORRT, CUDA] if self._tensorrt else [CUDA]
        if missing := [provider for provider in wanted if provider not in installed]:
            raise BackendError(
                f"{device} was requested, but this onnxruntime has no {missing[0]} (only "
                f"{', '.join(installed)}); pip install onnxruntime-gpu in place of onnxruntime"
            )
        options = {
            "device_id": str(stream.device.index),
            "user_compute_stream": str(stream.cuda_stream),
        }
        chosen = {provider: dict(options) for provider in wanted}
        chosen[CUDA]["use_tf32"] = "0"  # float32 means float32: the gate's bounds rely on it
        return {**chosen, CPU: {}}


def _tensorrt_available(version: str) -> Availability:
    """Whether the TensorRT provider is there, and a GPU for it."""
    import onnxruntime

    if TENSORRT not in onnxruntime.get_available_providers():
        fix = "pip uninstall onnxruntime && pip install onnxruntime-gpu tensorrt"
        return Availability(False, f"{version} has no {TENSORRT}", fix)
    if not torch.cuda.is_available():
        reason = f"{version}: PyTorch finds no NVIDIA GPU for its {TENSORRT}"
        return Availability(False, reason, "run on a machine with an NVIDIA GPU")
    return Availability(True, f"{version} with TensorRT on {torch.cuda.get_device_name()}")


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime has the CUDA provider."""
    import onnxruntime

    return CUDA in onnxruntime.get_available_providers()


class _OrtPart:
    """One session. One instance serves one thread."""

    def __init__(
        self, session: Any, path: Path, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        import onnxruntime

        self._session, self._path, self._device, self._stream = session, path, device, stream
        outputs = session.get_outputs()
        if len(outputs) != 1:
            raise BundleError(f"{path} has {len(outputs)} outputs instead of one; build it again")
        self._output = outputs[0]
        self._dtypes = {value.name: _dtype(value, path) for value in session.get_inputs()}
        self._output_dtype = _dtype(self._output, path)
        self._shapes = {value.name: value.shape for value in session.get_inputs()}
        self.input_names = tuple(self._dtypes)
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = FATAL
        if stream is not None:  # the events of `ordered_on` order the work instead
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        bound = {
            name: tensor.to(self._device, self._dtypes[name]).contiguous()
            for name, tensor in inputs.items()
        }
        shape = self._output_shape(bound)
        output = None
        if shape is not None:
            output = torch.empty(shape, dtype=self._output_dtype, device=self._device)
        if self._stream is None:
            output = self._run(bound, output)
        else:
            used = [*bound.values(), *([] if output is None else [output])]
            with ordered_on(self._stream, used), torch.cuda.stream(self._stream):
                output = self._run(bound, output)
            output.record_stream(torch.cuda.current_stream(self._device))
        return output.float()

    def _run(self, inputs: dict[str, Tensor], output: Tensor | None) -> Tensor:
        binding = self._session.io_binding()
        place = (self._device.type, self._device.index or 0)
        for name, tensor in inputs.items():
            kind = ONNX_TYPES[tensor.dtype]
            binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        if output is None:
            binding.bind_output(self._output.name, *place)
        else:
            kind = ONNX_TYPES[output.dtype]
            shape, address = tuple(output.shape), output.data_ptr()
            binding.bind_output(self._output.name, *place, kind, shape, address)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # as above
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            raise BackendError(
                f"ONNX Runtime refused {self._path.name} with {shapes}: {one_line(error)}"
            ) from error
        if output is None:  # a copy, so that the session's own memory returns to it in order
            output = torch.utils.dlpack.from_dlpack(binding.get_outputs()[0]).clone()
        return output

    def _output_shape(self, inputs: dict[str, Tensor]) -> list[int] | None:
        """The output's shape from the named dimensions of the inputs, or None if one is not there
        (8·latent_height): then ONNX Runtime allocates the output.
        """
        sizes: dict[str, int] = {}
        for name, tensor in inputs.items():
            sizes.update(zip(self._shapes[name], tensor.shape, strict=False))
        shape = [dim if isinstance(dim, int) else sizes.get(dim) for dim in self._output.shape]
        return None if None in shape else shape  # type: ignore[return-value]


def _dtype(value: Any, path: Path) -> torch.dtype:
    if value.type not in DTYPES:
        raise BundleError(
            f"{path}: {value.name} is a {value.type}, which no component has; build it again"
        )
    return DTYPES[value.type]
