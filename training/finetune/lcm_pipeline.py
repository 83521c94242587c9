"""A pipeline folder whose transformer is a distilled student: its scheduler becomes LCM's.

    model_index.json                    "scheduler": ["diffusers", "LCMScheduler"]
    scheduler/scheduler_config.json     LCMScheduler, on the betas that were there

A student's weights do not say that they are one. By these files diffusers and `pixart-rt build`
know it: the bundle's manifest then names the sampler lcm, which runs without guidance.
"""

from __future__ import annotations

import json
from pathlib import Path

from pixart_rt.checkpoints.sampling_defaults import GUIDANCE_SCALE, NUM_STEPS
from pixart_rt.config import Scheduler
from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json, replacing
from pixart_rt.inference.schedulers import make_scheduler

INDEX = "model_index.json"


def use_lcm_scheduler(folder: Path) -> None:
    """Rewrite the two files of a diffusers pipeline folder; the second time nothing changes.

    Raises CheckpointError for a folder that is no pipeline.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX}; give a pipeline folder, with the student as its transformer"
        )
    parts = read_json(index)
    scheduler = make_scheduler(Scheduler.LCM, folder / "scheduler")
    parts["scheduler"] = ["diffusers", type(scheduler).__name__]
    for stated in (GUIDANCE_SCALE, NUM_STEPS):  # the teacher's
        parts.pop(stated, None)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
    _write(index, json.dumps(parts, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
