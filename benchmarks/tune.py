"""The tables of `pixart-rt tune` for this card, kept after every entry.

    python -m benchmarks.tune --json OUT            on a GPU, bfloat16

The same search, but others time in between, and what was found is on the disk when it is stopped.
`pixart-rt tune --help` says where a table is read from; one for all cards of an architecture is
kernels/tuned/smXY.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import failure, kernels_tested
from pixart_rt.bench.gpu_lock import alone
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.kernels import tuning
from pixart_rt.kernels.launch import refused_lines


def timed_alone(call: Callable[[], Any]) -> float:
    with alone():
        return tuning.milliseconds(call)


def run(
    device: torch.device,
    timer: tuning.Timer,
    save: ResultFile,
    seconds: float = float("inf"),
    workers: int = 0,
) -> dict[str, Any]:
    """{"table": what `tune` makes, "rows": one for each shape that failed}, saved as it grows."""
    values: dict[str, Any] = {"measured": device.type == "cuda", "table": {}, "rows": []}

    def keep(table: dict[str, Any]) -> None:
        values["table"] = table
        values["rows"] = [
            {"operator": line, "agrees": False, "failed": line} for line in table["failed"]
        ]
        save(values | {"refused_kernels": refused_lines()})

    try:
        table = tuning.tune(
            device, torch.bfloat16, timer=timer, save=keep, seconds=seconds, workers=workers,
            report=lambda line: print(line, flush=True),
        )  # fmt: skip
        keep(table)
    except Exception as error:  # what was found so far is on the disk
        values["rows"].append({"operator": "tune", **failure(error)})
        save(values | {"refused_kernels": refused_lines()})
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="begin nothing after this")
    parser.add_argument("--workers", type=int, default=6, help="processes that compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("configurations were to be timed, but this machine has no CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    kernels_tested(device, torch.bfloat16, training=True)
    values = run(device, timed_alone, ResultFile(args.json), 60 * args.minutes, args.workers)
    return 0 if all(row["agrees"] for row in values["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
