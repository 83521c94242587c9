"""What every result file carries: commit, command, versions and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from pixart_rt.version import __version__

CHECKOUT = Path(__file__).resolve().parents[2]
NAMED = {
    "torch", "triton", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt_rtx_cu13_libs", "numpy",
}  # fmt: skip


def provenance(command: str) -> dict[str, Any]:
    """Commit (with `+` for uncommitted changes; None outside a checkout), command line, library
    versions, hardware, date.
    """
    import torch

    versions = {d.metadata["Name"]: d.version for d in distributions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "pixart_rt": __version__,
            **{name: version for name, version in sorted(versions.items()) if name in NAMED},
        },
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": gpu,
            "load_average_at_end": [round(value, 2) for value in os.getloadavg()],
        },
    }


def _commit() -> str | None:
    if not (CHECKOUT / ".git").exists():  # an installed package may lie below another's checkout
        return None

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
        return ran.stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
