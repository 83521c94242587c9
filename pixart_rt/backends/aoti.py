"""AOTInductor packages: compiled by torch.compile's backend ahead of time, one .pt2 per part.

A package is for one kind of device, and on a CPU for its vector instructions. Loading one needs
neither a compiler nor the model's Python code.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.backends.component import Availability, Component
from pixart_rt.backends.engine_files import (
    Chain,
    FunctionPart,
    capability,
    check_device,
    current,
    engine_paths,
    one_line,
    part_inputs,
)
from pixart_rt.bundle import Manifest
from pixart_rt.errors import BackendError, BundleError

_CANNOT_MAP = ("failed to map segment", "Operation not permitted")  # dlopen's words
CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs what the earlier ones run


class AotInductorBackend:
    """Packages written by torch._inductor.aoti_compile_and_package."""

    name = "aoti"

    def available(self) -> Availability:
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        return Availability(True, f"AOTInductor packages of torch {torch.__version__} on {place}")

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        check_device(device)
        paths = engine_paths(bundle, manifest, name)
        controlled = manifest.control is not None
        return Chain(
            name,
            [
                FunctionPart(
                    on_its_device(load_package(path, device), device),
                    part_inputs(name, index, controlled=controlled),
                )
                for index, path in enumerate(paths)
            ],
            capturable=True,
        )


def load_package(path: Path, device: torch.device) -> Any:
    """A package as a callable of keyword tensors, checked to be for this device."""
    index = device.index if device.type == "cuda" and device.index is not None else -1
    quiet = logging.getLogger("torch._inductor.package.package")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # a damaged file is first called "outdated", then refused
    try:
        package = torch._inductor.aoti_load_package(str(path), device_index=index)
        built_for = package.get_metadata()
    except (RuntimeError, OSError, ValueError) as error:
        if any(words in str(error) for words in _CANNOT_MAP):
            raise BackendError(
                f"the engine {path} could not be loaded from {tempfile.gettempdir()}, where "
                f"programs may not run ({one_line(error)}); set TMPDIR to a folder of a file "
                "system that is not mounted noexec"
            ) from error
        raise BundleError(
            f"the engine {path} is damaged or from another torch than {torch.__version__} "
            f"({one_line(error)}); build the bundle again"
        ) from error
    finally:
        quiet.setLevel(level)
    _check_device(path, built_for, device)
    return package


def on_its_device(package: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The package called with `device` current: it queues its work on the current one's stream."""

    def call(**inputs: Tensor) -> Tensor:
        with current(device):
            return package(**inputs)

    return call


def _check_device(path: Path, built_for: dict[str, str], device: torch.device) -> None:
    kind = built_for.get("AOTI_DEVICE_KEY", device.type)
    if kind != device.type:
        raise BackendError(
            f"{path} was compiled for {kind}, {device} was requested; build the bundle again here "
            f"or use a {kind} device"
        )
    if device.type == "cpu":
        needed = _cpu_level(built_for.get("AOTI_CPU_ISA", ""))
        present = _cpu_level(torch.backends.cpu.get_cpu_capability())
        if needed > present:
            raise BackendError(
                f"{path} was compiled for {CPU_CAPABILITIES[needed]}, this CPU has "
                f"{CPU_CAPABILITIES[present]}; build the bundle again on this machine"
            )
    elif (wanted := built_for.get("AOTI_COMPUTE_CAPABILITY")) and wanted not in (
        capability(device),
        capability(device).removeprefix("sm"),
    ):
        raise BackendError(
            f"{path} was compiled for compute capability {wanted}, this GPU is "
            f"{capability(device)}; build the bundle again on this machine"
        )


def _cpu_level(words: str) -> int:
    return max(i for i, word in enumerate(CPU_CAPABILITIES) if i == 0 or word in words.upper())
