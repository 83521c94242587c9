"""A fresh process to its first image: run as `python -m pixart_rt.bench.cold`, by `cold_start`.

The child loads one system and makes one image. Its clock is the parent's (time.monotonic is the
machine's), so interpreter start and imports are counted. It also tells its peak memory: it has held
nothing but this system. A compiler's cache is empty; the files are where the operating system has
them, in memory if they were read before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixart_rt.bench.request import BenchRequest
from pixart_rt.errors import BackendError

_PATHS = ("bundle", "peer_model")


def cold_start(system: str, request: BenchRequest) -> dict[str, Any]:
    """Seconds of the phases of a fresh process, and its peak memory in bytes.

    imports_s, load_s, first_image_s follow each other and make up total_s. Raises BackendError
    with the child's last line if it failed.
    """
    job = json.dumps({"system": system, "request": asdict(request)}, default=str)
    with tempfile.TemporaryDirectory(prefix="pixart_rt-cold-") as cache:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pixart_rt.bench.cold", job],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise BackendError(f"{system} failed in a fresh process: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    marks = [started, *found["marks"]]
    names = ("imports_s", "load_s", "first_image_s")
    phases = {
        name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)
    }
    return {**phases, "total_s": marks[-1] - started, "peak_memory": found["peak_memory"]}


def _main(job: str) -> None:
    values = json.loads(job)
    import torch

    from pixart_rt.bench.systems import load_system

    request = request_from(values["request"])
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    marks = [time.monotonic()]
    system = load_system(values["system"], request)
    marks.append(time.monotonic())
    batch = request.batches[0]
    system([request.prompt] * batch, [request.seed + k for k in range(batch)])
    marks.append(time.monotonic())
    print(json.dumps({"marks": marks, "peak_memory": peak_memory(system.device)}))


def request_from(values: dict[str, Any]) -> BenchRequest:
    """A request back from its JSON."""
    paths = {name: values[name] and Path(values[name]) for name in _PATHS}
    lists = {name: tuple(values[name]) for name in ("batches", "peers")}
    return BenchRequest(**{**values, **paths, **lists})


def peak_memory(device: Any) -> dict[str, int]:
    """Bytes at the peak: of the process, and of PyTorch's allocator on a GPU.

    `cuda_in_use` is what all programs hold on the device now, for engines that allocate beside
    PyTorch.
    """
    import torch

    found = {"process": _process_peak()}
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        found["cuda_allocated"] = torch.cuda.max_memory_allocated(device)
        found["cuda_reserved"] = torch.cuda.max_memory_reserved(device)
        found["cuda_in_use"] = whole - free
    return found


def _process_peak() -> int:
    """The largest resident set. Not getrusage on Linux: there a child begins at its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _main(sys.argv[1])
