"""The tables of `pixart-rt tune` for this card, kept after every operator.

    python -m benchmarks.tune --json OUT            on a GPU, bfloat16

The same search, but candidates are compiled while others time, and what was found is on the disk
when it is stopped. `pixart-rt tune --help` says where a table is read from; one for all cards of an
architecture is kernels/tuned/smXY.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import Saver
from benchmarks.truth import failure, kernels_tested, refused
from benchmarks.turns import alone
from pixart_rt.kernels import tuning


def timed_alone(call: Callable[[], Any]) -> float:
    with alone():
        return tuning.milliseconds(call)


def run(device: torch.device, timer: tuning.Timer, save: Saver) -> dict[str, Any]:
    """{"table": what `tune` makes of all operators, "rows": one for each}, saved as they come."""
    values: dict[str, Any] = {"measured": device.type == "cuda", "table": {}, "rows": []}
    for subject in tuning.SUBJECTS:
        row: dict[str, Any] = {"operator": subject.op, "agrees": True}
        try:
            table = tuning.tune(
                device, torch.bfloat16, subjects=(subject,), timer=timer,
                report=lambda line: print(line, flush=True),
            )  # fmt: skip
            operators = {**values["table"].get("operators", {}), **table["operators"]}
            values["table"] = {**table, "operators": operators}
        except Exception as error:
            row |= failure(error)
            print(f"{subject.op}: {row['failed']}", flush=True)
        values["rows"].append(row | {"refused_kernels": refused()})
        save(values)
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("configurations were to be timed, but this machine has no CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    kernels_tested(device, torch.bfloat16, training=True)
    values = run(device, timed_alone, Saver(args.json, "tune", measured=True))
    return 0 if all(row["agrees"] for row in values["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
