"""How long recipes/tiny.toml will take on two cores: CPU seconds of a step of each phase, summed.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.tiny_recipe --trained runs/tiny \
        --out tiny-recipe

Each rank has one thread. CPU seconds, so that other work on the machine disturbs less than it would
wall time; so what the ranks wait for each other is not counted, nor are checkpoints. Scenes are
encoded once. With --trained, also the minutes that the steps of a whole run took by its logs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.provenance import write_result
from examples.tiny.data import RECIPE, open_encoder, scene_sets, scene_store
from pixart_rt.config import Precision
from pixart_rt.data.store import FeatureStore
from pixart_rt.training.phases import phase_trainer
from pixart_rt.training.process_group import Ranks, start_ranks
from pixart_rt.training.progress import silent
from pixart_rt.training.recipe import Phase, Recipe, Start, read_recipe
from pixart_rt.training.run_options import Compute, TrainOptions


def measure(recipe: Recipe, phase: Phase, ranks: Ranks, out: Path, count: int) -> dict[str, Any]:
    """CPU seconds of all ranks for a step, and of one for a scene that is drawn and encoded; from
    random weights, which compute the same."""
    batch = phase.global_batch(recipe.settings)
    alone = replace(recipe, phases=(replace(phase, num_images=batch, start=Start.RANDOM),))
    ((name, scenes),) = scene_sets(alone).items()
    encoder = open_encoder(ranks.device)
    begun = time.process_time()
    if ranks.is_first:
        scene_store(scenes, out, name, encoder, silent)
    encoding = (time.process_time() - begun) / batch
    ranks.barrier()
    source = FeatureStore(out / "features" / name)
    options = TrainOptions(compute=Compute(precision=Precision.BF16, workers=0))
    trainer, *_ = phase_trainer(alone, alone.phases[0], source, options, out, ranks)
    seconds = []
    for data in trainer.feed(0, count + 1):
        begun = time.process_time()
        trainer.step(data)
        seconds.append(time.process_time() - begun)
    step = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the first one prepares
    return {
        "steps": phase.steps,
        "batch": batch,
        "cpu_seconds_per_step": step * ranks.num_ranks,
        "scenes": phase.num_images,
        "cpu_seconds_per_scene": encoding,  # of the first rank
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed, of each phase")
    parser.add_argument("--trained", type=Path, help="a folder that the recipe was run into")
    parser.add_argument("--out", help="name under benchmarks/results, without .json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe, found, encoded = read_recipe(RECIPE), {}, set()
    with tempfile.TemporaryDirectory() as own, start_ranks("cpu") as ranks:
        shared = [own]
        dist.broadcast_object_list(shared)
        for phase in recipe.phases:
            row = measure(recipe, phase, ranks, Path(shared[0]) / phase.name, args.steps)
            scenes = phase.data, phase.resolution, phase.multi_scale, phase.num_images
            row["encodes"] = scenes not in encoded
            encoded.add(scenes)
            row |= minutes(row)
            found[phase.name] = row
            if ranks.is_first:
                print(phase.name, json.dumps(row), flush=True)
        first = ranks.is_first
        ranks.barrier()  # before the shared folder goes
    total = sum(row["minutes_of_steps"] + row["minutes_of_encoding"] for row in found.values())
    result = {"ranks": ranks.num_ranks, "phases": found, "predicted_minutes_on_two_cores": total}
    if args.trained:
        result["logged_minutes_of_steps"] = logged_minutes(args.trained)
    if first:
        print(f"{total:.0f} minutes on two cores, predicted")
    if first and args.out:
        write_result(args.out, result)


def logged_minutes(run: Path) -> dict[str, float]:
    """Wall time between the log lines of each phase: steps and checkpoints, not encoding."""
    found = {}
    for path in sorted(run.glob("*/log.jsonl")):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found[path.parent.name] = sum(line["seconds"] for line in lines) / 60
    return found


def minutes(row: dict[str, Any]) -> dict[str, float]:
    """Of a phase whose CPU seconds two cores share, predicted."""
    encoding = row["scenes"] * row["cpu_seconds_per_scene"] if row["encodes"] else 0.0
    steps = row["steps"] * row["cpu_seconds_per_step"]
    return {"minutes_of_steps": steps / 2 / 60, "minutes_of_encoding": encoding / 2 / 60}


if __name__ == "__main__":
    main()
