"""`pixart-rt bench` of a bundle among other benchmarks: the GPU is its own while images are timed.

    python -m benchmarks.image BUNDLE --steps 20 --repeats 5 --peer diffusers --json OUT

Building and loading, here of twenty gigabytes, hold nobody up. The exit code is 1 where the peer
draws other images.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from benchmarks.provenance import Saver, provenance
from benchmarks.turns import alone, compiler_waits
from pixart_rt.bench.request import PEERS, BenchRequest
from pixart_rt.bench.run import run

LOADED = "the machine's limits"  # what `run` reports when all systems are loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peer", action="append", default=[], choices=PEERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    request = BenchRequest(
        bundle=args.bundle, steps=args.steps, repeats=args.repeats, peers=tuple(args.peer),
        cold=False,
    )  # fmt: skip
    compiler_waits()
    with ExitStack() as turn:

        def report(what: str, done: int, total: int) -> None:
            print(f"{done}/{total} {what}", flush=True)
            if what == LOADED:
                turn.enter_context(alone())

        found = run(request, provenance()["command"], report)
    Saver(args.json, "image", measured=True)(found)
    for name, system in found["systems"].items():
        for series in system["series"]:
            print(f"{name} {series['prompts']}: p50 {series['p50_s']:.3f} s", flush=True)
    return 0 if all(each["agrees"] for each in found["agreement"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
