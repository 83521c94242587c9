"""Builds PixArt-XL/2 (random weights) as TensorRT-RTX engines without a GPU: time, memory, size.

Runs `pixart-rt build --model xl-random --res 1024 --backend tensorrt-rtx --target sm80
--components transformer,vae` as a user would and watches its whole process tree.
    python benchmarks/build_xl.py            writes benchmarks/results/build_xl.json
Memory is the largest sum of resident sizes over the tree, sampled four times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.provenance import write_result

SAMPLE_SECONDS = 0.25


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants, files mapped in counted once a process."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # a child ended between listing and reading; the next sample sees the rest
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--target", default="sm80")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "xl"
        command = [
            sys.executable, "-m", "pixart_rt", "build", "--model", "xl-random",
            "--res", str(arguments.res), "--backend", "tensorrt-rtx", "--target", arguments.target,
            "--components", "transformer,vae", "--out", str(out),
        ]  # fmt: skip
        started = time.monotonic()
        child = subprocess.Popen(command)
        peak = 0
        while child.poll() is None:
            peak = max(peak, resident_bytes(psutil.Process(child.pid)))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
        if child.returncode:
            sys.exit(child.returncode)
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        engines = {
            name: sum((out / part).stat().st_size for part in entry["parts"])
            for name, entry in manifest["components"].items()
        }
    result = {
        "model": "xl-random", "resolution": arguments.res, "target": arguments.target,
        "seconds": round(seconds, 1), "peak_resident_bytes": peak, "engine_bytes": engines,
        "build": manifest["build"],
        "parity": {name: entry["parity"] for name, entry in manifest["components"].items()},
    }  # fmt: skip
    path = write_result("build_xl", result)
    print(f"{seconds:.0f} s, peak {peak / 2**30:.2f} GiB, engines {engines}: {path}")


if __name__ == "__main__":
    main()
