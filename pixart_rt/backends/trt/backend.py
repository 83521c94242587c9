"""TensorRT and TensorRT-RTX: one code path over two modules of the same interface.

TensorRT-RTX builds for GPUs that are not there and finishes the kernels on the machine that runs
them (cache.py keeps them on disk); TensorRT builds for the present GPU only. Running
either needs a GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from pixart_rt.backends.architectures import check_architecture
from pixart_rt.backends.component import Availability, Component
from pixart_rt.backends.engine_files import Chain, capability, engine_paths, entry_of, one_line
from pixart_rt.backends.trt.arena import Arena
from pixart_rt.backends.trt.cache import RuntimeCache
from pixart_rt.backends.trt.engine import Engine
from pixart_rt.backends.trt.plugins import register
from pixart_rt.bundle import Manifest
from pixart_rt.errors import BackendError


class Library(NamedTuple):
    """One of the two libraries."""

    name: str  # of the backend
    module: str
    packages: str  # what pip installs


LIBRARIES = {
    "tensorrt-rtx": Library(
        "tensorrt-rtx",
        "tensorrt_rtx_bindings",
        "tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
    "tensorrt": Library("tensorrt", "tensorrt", "tensorrt"),
}


class TensorRTBackend:
    """Serialized engines of one of the two libraries.

    The engines that one object loads share an arena per device, so they serve one thread together.
    """

    def __init__(self, name: str, *, cuda_graphs: bool = False) -> None:
        self.name = name
        self._library = LIBRARIES[name]
        self._cuda_graphs = cuda_graphs
        self._arenas: dict[torch.device, Arena] = {}

    def available(self) -> Availability:
        try:
            trt = import_library(self.name)
        except BackendError as error:
            reason = f"{self.name} is not installed ({one_line(error.__cause__)})"
            return Availability(False, reason, f"pip install {self._library.packages}")
        version = f"{self.name} {trt.__version__}"
        if not torch.cuda.is_available():
            can = "engines can be built" if self.name == "tensorrt-rtx" else "it is installed"
            return Availability(
                False,
                f"{version}: {can} but not run, PyTorch finds no NVIDIA GPU",
                "run on a machine with an NVIDIA GPU and a CUDA build of torch",
            )
        present = capability(torch.device("cuda"))
        known = supported_targets(self.name)
        if known and present not in known:
            return Availability(
                False,
                f"{version} runs on {', '.join(known)}; this GPU is {present}",
                "choose --backend tensorrt, onnxruntime or torch",
            )
        return Availability(True, f"{version} on {torch.cuda.get_device_name()}")

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        return self.load_variant(bundle, manifest, name, device, plugins=None)

    def load_variant(
        self,
        bundle: Path,
        manifest: Manifest,
        name: str,
        device: torch.device,
        *,
        plugins: bool | None,
    ) -> Chain:
        """The component with plugins, or without; None: what the manifest found faster here."""
        trt = import_library(self.name)
        entry = entry_of(bundle, manifest, name)
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BackendError(
                f"{self.name} engines run on an NVIDIA GPU, {device} is not supported; use a CUDA "
                "device or build the bundle with --backend onnxruntime"
            )
        check_architecture(device)  # the pipeline around the engines is PyTorch's
        if entry.targets and capability(device) not in entry.targets:
            raise BackendError(
                f"{name} was built for {', '.join(entry.targets)}, this GPU is "
                f"{capability(device)}; build it again with --target {capability(device)}"
            )
        if plugins is None:
            gpu = torch.cuda.get_device_name(device)
            plugins = entry.plugins is not None and entry.plugins.faster_on(gpu)
        if plugins:
            assert entry.plugins is not None
            entry = replace(entry, parts=entry.plugins.parts)
            register(trt)
        paths = engine_paths(bundle, manifest.with_entry(name, entry), name)
        if device not in self._arenas:
            self._arenas[device] = Arena(device)
        parts = []
        for part, path in zip(entry.parts, paths, strict=True):
            cache = RuntimeCache.of(trt, entry.files.get(part, ""), device)
            engine = Engine(trt, path, self._arenas[device], cache, cuda_graphs=self._cuda_graphs)
            parts.append(engine)
        return Chain(name, parts)


def import_library(name: str) -> ModuleType:
    """The module of a library, or a BackendError that names the packages to install."""
    library = LIBRARIES[name]
    try:
        return importlib.import_module(library.module)
    except (ImportError, OSError) as error:  # OSError: the wheel is there, its libraries are not
        raise BackendError(
            f"{name} is not installed ({one_line(error)}); pip install {library.packages}"
        ) from error


def supported_targets(name: str) -> tuple[str, ...]:
    """The compute capabilities that a library can build for without the GPU at hand, smallest
    first; none for `tensorrt`, which builds for the present GPU.
    """
    capabilities = getattr(import_library(name), "ComputeCapability", None)
    if capabilities is None:
        return ()
    names = [member for member in capabilities.__members__ if member.startswith("SM")]
    return tuple(member.lower() for member in sorted(names, key=lambda sm: int(sm[2:])))
