"""See benchmarks/gpu/run.sh."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import jobs, pool, report
from benchmarks.gpu.keep import signalled_with_parent
from benchmarks.gpu.pack import Packer
from pixart_rt.bench.provenance import COMMAND, COMMIT

NEEDED = ("bs4", "diffusers", "ftfy", "peft", "pytest", "sentencepiece", "transformers", "triton")
ENDING = 15  # seconds kept for the last copy and the tables


def main() -> int:
    args = arguments()
    began = time.monotonic() - (time.time() - args.began)
    os.environ[COMMAND] = " ".join(["benchmarks/gpu/run.sh", *args.words])
    os.environ[COMMIT] = args.commit or ""
    signal.signal(signal.SIGTERM, _leave)
    signalled_with_parent(signal.SIGTERM)
    name = f"{args.call}-{report.card()}"
    results: list[pool.Result] = []
    with tempfile.TemporaryDirectory(prefix="pixart_rt-gpu-") as folder:
        work = Path(folder)
        for part in ("parts", "weights"):
            (work / part).mkdir()
        stages = jobs.stages(args.call, work, args.small, args.parts)
        every = [job for stage in stages for job in stage.jobs]
        base = report.origin(args.call)

        def collect() -> dict[str, Any]:
            seconds = time.monotonic() - began
            return report.collect(work / "parts", every, list(results), seconds, base)

        with Packer(collect, work / "parts", args.out, name):
            try:
                pool.run(stages, work / "parts", began + args.seconds - ENDING, results=results)
            finally:
                shutil.rmtree(work / "weights", ignore_errors=True)
        print(report.text(collect()), flush=True)
    print(f"{args.out / name}.json")
    return 0 if all(result.well for result in results) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.sh", description="Check or measure everything on this GPU."
    )
    parser.add_argument("call", choices=jobs.CALLS)
    parser.add_argument("out", type=Path, nargs="?", help="folder; default the variable OUT")
    parser.add_argument("--seconds", type=float, help=f"of the whole call; default {jobs.SECONDS}")
    parser.add_argument("--parts", default="", help="comma list; default all but those of minutes")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--commit", help="of the sources, where they lie outside a checkout")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    words = sys.argv[1:]
    args.words = words[: words.index("--began")] if "--began" in words else words
    args.parts = [part for part in args.parts.split(",") if part]
    known = jobs.parts_of(args.call)
    if unknown := sorted(set(args.parts) - set(known)):
        parser.error(f"--parts {unknown[0]} is not one of {', '.join(known)}")
    if args.out is None and not os.environ.get("OUT"):
        parser.error("no folder for the results was given, and the variable OUT is not set")
    args.out = (args.out or Path(os.environ["OUT"])).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.seconds = args.seconds or jobs.SECONDS[args.call] * (10 if args.small else 1)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(
            f"{', '.join(missing)} cannot be imported here; collect its wheels on another machine "
            "with benchmarks/gpu/wheels.sh"
        )
    return args


def _leave(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main())
