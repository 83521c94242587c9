"""Repeat what the paper reports, in miniature: what each of its ideas gives, with and without.

    python -m examples.ablation --out runs/ablation --minutes 120
    python -m examples.ablation --out runs/try --steps 40 --resolution 64 --layers 4

Re-parameterisation, adaLN-single, dense captions and decomposed training. Five models learn drawn
scenes with equal steps, from equal starts; OUT gets a table and a picture for each claim, whatever
they show. A run that was stopped is resumed by the same command. On a new folder give --minutes
or --steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.ablation.arms import POINTS, Plan, planned, steps_within
from examples.ablation.report import write
from examples.ablation.run import Ablation, seconds_per_step
from examples.ablation.shapes import costs
from examples.script import run_script
from pixart_rt.bench.provenance import provenance
from pixart_rt.cli.console import Steps, note
from pixart_rt.errors import ConfigError
from pixart_rt.files import check_into
from pixart_rt.training.process_group import start_ranks


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    check_into(args.out)
    asked = {
        "resolution": args.resolution, "captions": args.captions, "num_layers": args.layers,
        "batch": args.batch, "steps": args.steps, "seed": args.seed,
    }  # fmt: skip
    with start_ranks(args.device) as ranks, Steps() as progress:

        def find_steps(known: dict[str, Any]) -> int:
            if args.minutes is None:
                raise ConfigError(f"{args.out} holds no ablation yet; give --minutes or --steps")
            shortest = Plan(steps=POINTS, **known)
            with tempfile.TemporaryDirectory() as folder:
                seconds = seconds_per_step(shortest, Path(folder), ranks)
            found = steps_within(60 * args.minutes, seconds, POINTS)
            note(f"a step takes {seconds:.3g} s here: {found} steps a unit, six units in all")
            return found

        given = {name: value for name, value in asked.items() if value is not None}
        ablation = Ablation(planned(args.out, given, find_steps), args.out, ranks, progress)
        curves = ablation.run()
        measured = costs(ablation.config, ablation.some_batch())
    words = sys.argv[1:] if arguments is None else arguments
    about = provenance(" ".join(["python -m examples.ablation", *words]))
    for path in write(args.out, ablation.plan, curves, measured, about):
        print(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the run's folder; a run there is resumed"
    )
    parser.add_argument(
        "--minutes", type=float,
        help="about how long all arms take; steps follow from a measurement",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, help="steps of one unit instead; all arms take six units"
    )
    parser.add_argument("--resolution", type=int, help="64, 128 or 256 pixels")
    parser.add_argument("--captions", type=int, help="held-out captions of a score")
    parser.add_argument("--layers", type=int, help="blocks of the models")
    parser.add_argument("--batch", type=int, help="images of a step")
    parser.add_argument("--seed", type=int, help="decides all that is random")
    parser.add_argument("--device", help="cuda or cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(main)
