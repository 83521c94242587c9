"""The samplers by name: diffusers' schedulers with PixArt's settings.

All share the training schedule (linear betas 1e-4 to 0.02 over 1000 timesteps, as in DiT), read
from the checkpoint's own scheduler configuration where it has one. Timesteps and coefficients stay
on the CPU, so that stepping never waits for the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from pixart_rt.config import Scheduler

TRAINING_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
SHARED = (*TRAINING_SCHEDULE, "prediction_type", "timestep_spacing")


def make_scheduler(name: Scheduler, folder: Path) -> Any:
    """A fresh diffusers scheduler, on the schedule of the folder's scheduler_config.json, if any.

    DPM-Solver++ takes the whole configuration, so that it is what diffusers would run.
    """
    path = Path(folder) / "scheduler_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else TRAINING_SCHEDULE
    schedule = {key: stored[key] for key in SHARED if key in stored}
    if name is Scheduler.DPM_SOLVER:
        return diffusers.DPMSolverMultistepScheduler.from_config(dict(stored))
    schedule.pop("timestep_spacing", None)  # each of the others has its own
    makers: dict[Scheduler, Callable[[], Any]] = {
        Scheduler.SA_SOLVER: lambda: diffusers.SASolverScheduler(
            algorithm_type="data_prediction",
            tau_func=lambda t: 1 if 200 <= t <= 800 else 0,  # as in the original PixArt code
            predictor_order=2,
            corrector_order=2,
            **schedule,
        ),
        Scheduler.DDIM: lambda: diffusers.DDIMScheduler(clip_sample=False, **schedule),
        Scheduler.IDDPM: lambda: diffusers.DDPMScheduler(
            variance_type="learned_range", clip_sample=False, **schedule
        ),
        Scheduler.LCM: lambda: diffusers.LCMScheduler(clip_sample=False, **schedule),
    }
    return makers[name]()


def stored_scheduler(folder: Path) -> Scheduler:
    """The sampler that a checkpoint's scheduler folder asks for: LCM, or DPM-Solver++."""
    path = Path(folder) / "scheduler_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    is_lcm = stored.get("_class_name") == "LCMScheduler"
    return Scheduler.LCM if is_lcm else Scheduler.DPM_SOLVER


def uses_learned_variance(name: Scheduler) -> bool:
    """Whether the sampler takes the model's variance channels; the others drop them."""
    return name is Scheduler.IDDPM
