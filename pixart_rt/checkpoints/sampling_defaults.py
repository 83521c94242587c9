"""How a checkpoint's makers sample it: the sampler it was trained for, its guidance and its steps.

    model_index.json
      "_pixart_rt_scheduler": "dmd"             else LCM where scheduler_config.json is LCM's
      "_pixart_rt_guidance_scale": 3.0          else 4.5
      "_pixart_rt_num_inference_steps": 20      else 20

diffusers ignores keys with a leading underscore. Weights of `pixart-rt finetune lcm` and merged
LCM-LoRAs also say in their origin.json that they are LCM's, so that a pipeline folder put together
by hand around them is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart_rt.checkpoints.pipeline_folder import INDEX
from pixart_rt.checkpoints.scheduler_config import SchedulerSettings
from pixart_rt.config import DISTILLED, SamplingConfig, SamplingDefaults, Scheduler
from pixart_rt.errors import CheckpointError, ConfigError

SCHEDULER = "_pixart_rt_scheduler"
GUIDANCE_SCALE = "_pixart_rt_guidance_scale"
NUM_STEPS = "_pixart_rt_num_inference_steps"
DMD_STUDENTS = frozenset({"PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512"})  # their files do not say


def read_sampling(
    folder: Path | None, model: str, origin: Mapping[str, Any] | None
) -> tuple[Scheduler, SamplingDefaults]:
    """The sampler that a model was trained for, and its defaults.

    folder: a pipeline's; None for a lone transformer or random weights. model: its name, which
    tells the published DMD student. origin: how the transformer was made, if it says so. A
    distilled model has no guidance to state: what its folder states of that is the teacher's.
    Raises CheckpointError for values that cannot be.
    """
    index = {} if folder is None else _read_index(folder / INDEX)
    try:
        scheduler = _trained_for(index, folder, model, origin)
        defaults = SamplingDefaults(
            guidance_scale=index.get(GUIDANCE_SCALE), num_inference_steps=index.get(NUM_STEPS)
        )
        if scheduler in DISTILLED:
            defaults = replace(defaults, guidance_scale=None)
        if defaults.num_inference_steps is not None:
            SamplingConfig(scheduler=scheduler, num_inference_steps=defaults.num_inference_steps)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{folder}/{INDEX}: {error}") from error
    return scheduler, defaults


def _trained_for(
    index: Mapping[str, Any], folder: Path | None, model: str, origin: Mapping[str, Any] | None
) -> Scheduler:
    stated = Scheduler.DPM_SOLVER
    if folder is not None:
        stated = SchedulerSettings.read(folder / "scheduler").sampler
    if SCHEDULER in index:
        return Scheduler(index[SCHEDULER])
    if model in DMD_STUDENTS:
        return Scheduler.DMD
    made_for = (origin or {}).get("scheduler")
    return stated if made_for is None else Scheduler(made_for)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is damaged (it holds {type(index).__name__})")
    return index
