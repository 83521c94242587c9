"""The backends by name. Each imports its library when it is first asked for something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pixart_rt.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import torch

    from pixart_rt.backends.component import Availability, Backend

BACKENDS = (
    "onnxruntime",
    "onnxruntime-tensorrt",
    "tensorrt-rtx",
    "tensorrt",
    "aoti",
    "torch",
    "torch-compile",
)

# Best first. Ahead-of-time packages are for those who ask: they are tied to one machine.
_ON_GPU = ("tensorrt-rtx", "tensorrt", "onnxruntime", "torch-compile", "torch")
_ON_CPU = ("onnxruntime", "torch")


def get_backend(name: str) -> Backend:
    """The backend of that name, or a ConfigError that lists the names."""
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name in ("tensorrt-rtx", "tensorrt"):
        from pixart_rt.backends.trt.backend import TensorRTBackend

        return TensorRTBackend(name)
    if name.startswith("onnxruntime"):
        from pixart_rt.backends.onnx_runtime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(tensorrt=name == "onnxruntime-tensorrt")
    if name == "aoti":
        from pixart_rt.backends.aoti import AotInductorBackend

        return AotInductorBackend()
    if name == "torch-compile":
        from pixart_rt.backends.pytorch.compiled import CompiledBackend

        return CompiledBackend()
    from pixart_rt.backends.pytorch.eager import EagerBackend

    return EagerBackend()


def choose_backend(target: tuple[str, ...] = ()) -> tuple[str, str]:
    """For `--backend auto`: the best backend that works on this machine, and why in one sentence.

    With `target` compute capabilities, the one library that builds for GPUs that are not here.
    """
    if target:
        return _builder_of(target)
    import torch

    on_gpu = torch.cuda.is_available()
    passed_over: list[str] = []
    for name in _ON_GPU if on_gpu else _ON_CPU:
        state = get_backend(name).available()
        if state.ok and not (on_gpu and _only_on_cpu(name)):
            place = "on this GPU" if on_gpu else "on this machine, which has no usable NVIDIA GPU"
            skipped = f"; passed over {'; '.join(passed_over)}" if passed_over else ""
            return name, f"{name} is the best that works {place} ({state.reason}){skipped}"
        passed_over.append(f"{name}: {state.reason}")
    raise BackendError(f"no backend works here: {'; '.join(passed_over)}")


def default_device(backend: str) -> torch.device:
    """The GPU if there is one that this backend can use, else the CPU."""
    import torch

    on_gpu = torch.cuda.is_available() and not _only_on_cpu(backend)
    return torch.device("cuda" if on_gpu else "cpu")


def runs_here(backend: str, targets: tuple[str, ...]) -> bool:
    """Whether an engine of this backend, compiled for these targets, can run on this machine."""
    if not get_backend(backend).available().ok:
        return False
    if not targets:
        return True
    import torch

    from pixart_rt.backends.engine_files import capability

    return torch.cuda.is_available() and capability(torch.device("cuda")) in targets


def available_backends() -> dict[str, Availability]:
    """Every backend with whether it works here."""
    return {name: get_backend(name).available() for name in BACKENDS}


def _builder_of(target: tuple[str, ...]) -> tuple[str, str]:
    from pixart_rt.backends.trt.backend import supported_targets

    target = tuple(name.lower() for name in target)
    known = supported_targets("tensorrt-rtx")  # a BackendError with the fix if not installed
    if unknown := [name for name in target if name not in known]:
        raise ConfigError(
            f"no backend builds for {', '.join(unknown)} without that GPU: "
            f"tensorrt-rtx builds for {', '.join(known)}; on the GPU itself leave --target out"
        )
    return (
        "tensorrt-rtx",
        f"tensorrt-rtx builds engines for {', '.join(target)} without that GPU at hand",
    )


def _only_on_cpu(name: str) -> bool:
    """Whether a backend that works here would leave the GPU unused."""
    if name != "onnxruntime":
        return False
    from pixart_rt.backends.onnx_runtime import has_cuda

    return not has_cuda()
