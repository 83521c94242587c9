"""Nsight Compute's figures for the three kernels that most of a step's time goes into.

    python -m benchmarks.profile_kernels --json OUT        on a GPU, with `ncu` on the path

Attention and the two linears of the feed-forward part at 1024 px (2 x 4096 tokens), bfloat16, as
`ncu --clock-control none` reads them: it repeats each launch until it has all counters, so times
explain each other and compare with nothing else.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import HIDDEN, cases
from pixart_rt.bench.gpu_lock import alone
from pixart_rt.bench.provenance import ResultFile

HEAVIEST = ("attention_qkv_packed", "linear_gelu", f"linear_gate_residual {HIDDEN}")
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
RUN = "--run"
RANGE = "measured"


def launch() -> None:
    """Each once to compile it, and once for the profiler to see."""
    device = torch.device("cuda")
    for case in cases(2, 4096, device, torch.bfloat16):
        if case.operator in HEAVIEST:
            inputs = case.make(0)
            case.ours(*inputs)
            torch.cuda.synchronize()
            with torch.cuda.nvtx.range(RANGE):
                case.ours(*inputs)
            torch.cuda.synchronize()


def parse(text: str) -> list[dict[str, Any]]:
    """`ncu --csv`'s rows, joined by launch: its kernel and metrics with their units."""
    start = text.index('"ID"')
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        if not row.get("Metric Name"):
            continue
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}})
        unit = f" ({row['Metric Unit']})" if row["Metric Unit"] else ""
        kernel["metrics"][row["Metric Name"] + unit] = row["Metric Value"]
    return list(kernels.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(RUN, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        launch()
        return 0
    if args.json is None:
        parser.error("--json is missing; say where the figures go")
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        parser.error(
            "figures of Nsight Compute were requested; they need a GPU and ncu on the path"
        )
    sections = [word for name in SECTIONS for word in ("--section", name)]
    with alone():
        ran = subprocess.run(
            ["ncu", "--csv", "--page", "details", "--clock-control", "none", *sections,
             "--nvtx", "--nvtx-include", f"{RANGE}/", sys.executable, "-m",
             "benchmarks.profile_kernels", RUN],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    kernels = parse(ran.stdout)
    ResultFile(args.json)({"kernels": kernels})
    for each in kernels:
        print(each["kernel"], json.dumps(each["metrics"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
