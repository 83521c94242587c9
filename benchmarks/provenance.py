"""What every result file carries: commit, command, versions and hardware; and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMED = {
    "torch", "triton", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime",
    "tensorrt_rtx_cu13_libs", "numpy",
}  # fmt: skip


def provenance() -> dict[str, Any]:
    """Commit (with `+` for uncommitted changes), command line, library versions, hardware, date."""
    import torch

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return ran.stdout.strip()

    versions = {d.metadata["Name"]: d.version for d in distributions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
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


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write_result(name: str, values: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write {provenance, **values} as benchmarks/results/NAME.json, aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps({**provenance(), **values}, indent=1) + "\n")
    temporary.rename(path)
    return path
