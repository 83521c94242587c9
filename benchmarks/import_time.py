"""CPU seconds that a user waits for imports: of the pipeline and of verbs, against torch alone.

    python -m benchmarks.import_time [--repeats 5]

Each program runs in a process of its own, all in turn; user and system time, so that other
programs disturb less. The floor is `import torch` of the same run: on a busy machine its seconds
vary twofold, the ratio to it much less. Medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, write_result

FLOOR = "import torch"


def programs(bundle: Path) -> dict[str, list[str]]:
    """What is measured by name; `bundle` is there and of exactly these settings."""
    verb = ["-m", "pixart_rt"]
    return {
        FLOOR: ["-c", FLOOR],
        "import pixart_rt": ["-c", "import pixart_rt"],
        "from pixart_rt import PixArtPipeline": ["-c", "from pixart_rt import PixArtPipeline"],
        "pixart-rt --help": [*verb, "--help"],
        "pixart-rt inspect": [*verb, "inspect", str(bundle)],
        "pixart-rt doctor": [*verb, "doctor"],
        "pixart-rt build, a cache hit": [*verb, *build(bundle)],
    }


def build(bundle: Path) -> list[str]:
    return ["build", "--model", "tiny", "--res", "256", "--backend", "torch", "--out", str(bundle)]


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of `python ARGUMENTS`, and of what it starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=environment, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeats: int) -> dict[str, Any]:
    """Seconds of each program, and its ratio to the floor."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        cpu_seconds(["-m", "pixart_rt", *build(bundle)])
        asked = programs(bundle)
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(repeats):
            for name, arguments in asked.items():
                seconds[name].append(round(cpu_seconds(arguments), 3))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "load_average": os.getloadavg(),
        "programs": {
            name: {
                "cpu_s": round(median, 3),
                "over_torch": round(median / medians[FLOOR], 2),
                "all_s": seconds[name],
            }
            for name, median in medians.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.repeats)
    for name, values in found["programs"].items():
        print(f"{values['cpu_s']:7.2f} s  {values['over_torch']:5.2f} x torch  {name}")
    print(write_result("import_time", found))


if __name__ == "__main__":
    main()
