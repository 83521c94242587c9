"""The record that every result file carries (commit, command, versions, hardware, load), and the
file itself, written anew after every row."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from pixart_rt.files import replacing
from pixart_rt.version import __version__

CHECKOUT = Path(__file__).resolve().parents[2]
NAMED = {
    "torch", "triton", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt_rtx_cu13_libs", "numpy",
}  # fmt: skip
# A script that starts benchmarks names its own command, and the commit of sources that lie outside
# a checkout, by these environment variables.
COMMAND, COMMIT = "PIXART_RT_BENCH_COMMAND", "PIXART_RT_BENCH_COMMIT"


def provenance(command: str | None = None) -> dict[str, Any]:
    """Commit (with `+` for uncommitted changes; None outside a checkout), command line, library
    versions, hardware, load, date. `command` is this process's unless given.
    """
    import torch

    versions = {d.metadata["Name"]: d.version for d in distributions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get(COMMIT) or _commit(),
        "command": os.environ.get(COMMAND) or command or command_line(),
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
            "load_average_at_end": load_average(),
        },
    }


def command_line() -> str:
    """The command that started this process, as one would type it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m MODULE`
    if spec is None:
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    module = spec.name.removesuffix(".__main__")
    start = ["pixart-rt"] if module == "pixart_rt" else ["python", "-m", module]
    return shlex.join([*start, *sys.argv[1:]])


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def first_line(error: BaseException) -> str:
    """What went wrong, for a row of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class ResultFile:
    """A JSON file of values behind their provenance, replaced as a whole each time it is written:
    a benchmark that is stopped loses no row. `path` None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._facts: dict[str, Any] = {} if path is None else provenance()

    def __call__(self, values: dict[str, Any]) -> None:
        if self.path is not None:
            self._facts["hardware"]["load_average_at_end"] = load_average()
            with replacing(self.path) as new:
                new.write_text(
                    json.dumps({**self._facts, **values}, indent=1) + "\n", encoding="utf-8"
                )

    def earlier(self, key: str) -> list[dict[str, Any]]:
        """The rows that a run before this one saved under a key; none if there was no such run."""
        if self.path is None or not self.path.is_file():
            return []
        rows: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))[key]
        return rows


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
