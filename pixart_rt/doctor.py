"""Facts about this machine: what is installed, which backends work, and the fix for each that
does not. Gathers only; `pixart-rt doctor` prints it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

LIBRARIES = (  # distributions whose versions decide what works
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13-libs",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt",
    "torchao",
)


def report() -> dict[str, Any]:
    """Everything `pixart-rt doctor` shows, ready for JSON.

    machine    pixart_rt, python, system, cores, memory_gib
    gpus       name, target (such as sm89), memory_gib of each; what PyTorch sees. Also ok, and
               reason and fix where this PyTorch has no kernels for it
    driver     NVIDIA driver version, or None
    libraries  distribution -> version, or None where it is not installed
    backends   name, ok, reason, fix of each
    auto       name and reason of what `--backend auto` takes here
    builds     targets that TensorRT-RTX builds engines for on this machine
    """
    from pixart_rt.backends import available_backends, choose_backend

    backends = available_backends()
    auto, why = choose_backend()
    return {
        "machine": machine(),
        "gpus": gpus(),
        "driver": driver(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "backends": [
            {"name": name, "ok": state.ok, "reason": state.reason, "fix": state.fix}
            for name, state in backends.items()
        ],
        "auto": {"name": auto, "reason": why},
        "builds": buildable_targets(),
    }


def machine() -> dict[str, Any]:
    """The computer, without its GPUs."""
    import psutil

    from pixart_rt.version import __version__

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "pixart_rt": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": available,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that PyTorch sees, and whether it can use them."""
    import torch

    from pixart_rt.backends.architectures import lacking

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        reason, fix = lacking(index) or ("", "")
        found.append(
            {
                "name": properties.name,
                "target": f"sm{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "ok": not reason,
                "reason": reason,
                "fix": fix,
            }
        )
    return found


def driver() -> str | None:
    """The NVIDIA driver's version. One without `gpus` means that torch is a CPU build."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi did not answer ({error})"
    lines = (done.stdout if done.returncode == 0 else done.stderr).split("\n")
    return lines[0].strip() or f"nvidia-smi ended with exit code {done.returncode}"


def version(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def buildable_targets() -> list[str]:
    """What TensorRT-RTX builds for here, GPU or not; nothing where it is not installed."""
    from pixart_rt.backends.trt.backend import supported_targets
    from pixart_rt.errors import BackendError

    try:
        return list(supported_targets("tensorrt-rtx"))
    except BackendError:  # `backends` says that it is missing, and the fix
        return []
