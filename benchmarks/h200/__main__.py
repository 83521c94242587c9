"""See benchmarks/h200.sh."""

from __future__ import annotations

import argparse
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.h200 import jobs, plots, pool, report

MINUTES = 8.5
NEEDED = ("bs4", "diffusers", "ftfy", "matplotlib", "pytest", "sentencepiece", "transformers",
          "triton")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/h200.sh", description="Measure everything on this GPU, before a deadline."
    )
    parser.add_argument("out", type=Path, help="folder for h200.json, plots, parts and logs")
    parser.add_argument(
        "--parts", default=",".join(jobs.PARTS),
        help=f"comma list; default {','.join(jobs.PARTS)}; also {','.join(jobs.EXTRA)}",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop everything after this")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--commit", help="of the sources, where they lie outside a checkout")
    args = parser.parse_args()
    began = time.monotonic()
    parts = args.parts.split(",")
    known = (*jobs.PARTS, *jobs.EXTRA)
    if unknown := sorted(set(parts) - set(known)):
        parser.error(f"--parts {unknown[0]} is not one of {', '.join(known)}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} cannot be imported here; install it first")
    out = args.out.resolve()
    for name in ("parts", "weights"):
        (out / name).mkdir(parents=True, exist_ok=True)
    try:
        stages = jobs.stages(out, parts, args.small)
        results = pool.run(stages, out / "parts", began + 60 * args.minutes)
    finally:
        shutil.rmtree(out / "weights", ignore_errors=True)  # 20 GB that a second run makes again
    found = report.collect(out, results, time.monotonic() - began)
    report.write(out / "h200.json", found | ({"commit": args.commit} if args.commit else {}))
    plots.write_plots(found, out)
    print(report.text(found))
    return 0 if all(result.done for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
