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
import torch
from torch import Tensor

from pixart_rt.config import Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.kernels.solver import ROW, Coefficient

TRAINING_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
DMD_TIMESTEP = 400  # at which PixArt-Alpha-DMD-XL-2-512x512 was trained and is called
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
        Scheduler.DMD: lambda: OneStep(diffusers.DDPMScheduler(**schedule).alphas_cumprod),
    }
    return makers[name]()


class OneStep:
    """Noise to image in one call of the model at one timestep, for DMD students (arXiv:2311.18828).

        x0 = (x - sqrt(1 - a) eps) / sqrt(a),    a = alphas_cumprod[400]

    with x the initial noise of variance 1, as the published PixArt-DMD demo runs: timesteps [400],
    one step, no guidance. It has the methods of a diffusers scheduler that the loop calls.
    """

    init_noise_sigma = 1.0

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """alphas_cumprod [1000] of the training schedule."""
        self._alpha = float(alphas_cumprod[DMD_TIMESTEP])
        self.timesteps = torch.tensor([DMD_TIMESTEP])

    def set_timesteps(self, num_inference_steps: int, device: str = "cpu") -> None:
        assert num_inference_steps == 1, "SamplingConfig refuses others"

    def scale_model_input(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x

    def step(
        self,
        noise: Tensor,
        timestep: Tensor,
        x: Tensor,
        generator: object = None,
        return_dict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The next latents and, as other schedulers give it, the estimate of x0: the same."""
        x0 = (x - (1 - self._alpha) ** 0.5 * noise) / self._alpha**0.5
        return x0, x0


def stored_scheduler(folder: Path) -> Scheduler:
    """The sampler that a checkpoint's scheduler folder asks for: LCM, or DPM-Solver++.

    A DMD student's folder names DDPM, as those of other checkpoints do, so DMD must be asked for.
    """
    path = Path(folder) / "scheduler_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    is_lcm = stored.get("_class_name") == "LCMScheduler"
    return Scheduler.LCM if is_lcm else Scheduler.DPM_SOLVER


def uses_learned_variance(name: Scheduler) -> bool:
    """Whether the sampler takes the model's variance channels; the others drop them."""
    return name is Scheduler.IDDPM


def dpmpp_coefficients(scheduler: Any, guidance_scale: float) -> Tensor:
    """The rows [S, 8] of kernels/solver.py, float32, for a scheduler with its timesteps set.

    From the noise levels of the scheduler, in float64; the last step, and with fewer than
    15 the first, are of first order, as in diffusers. Raises ConfigError for another solver than
    DPM-Solver++ 2M with midpoint that predicts noise.
    """
    config = scheduler.config
    expected = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
                "prediction_type": "epsilon", "thresholding": False}  # fmt: skip
    other = {key: config[key] for key in expected if config[key] != expected[key]}
    if other:
        raise ConfigError(f"the fused solver is DPM-Solver++ 2M midpoint, asked was {other}")
    sigmas = scheduler.sigmas.double()  # in units of the signal: alpha = 1 / sqrt(1 + sigma^2)
    alpha = 1 / (1 + sigmas**2).sqrt()
    sigma = sigmas * alpha
    lam = alpha.log() - sigma.log()  # inf at the end, where no noise is left
    steps = len(scheduler.timesteps)
    rows = torch.zeros(steps, ROW, dtype=torch.float64)
    for i in range(steps):
        shrink = torch.expm1(-(lam[i + 1] - lam[i]))
        last = i == steps - 1 and (
            config.euler_at_final
            or (config.lower_order_final and steps < 15)
            or config.final_sigmas_type == "zero"
        )
        half = 0.0
        if i > 0 and not last:
            half = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])  # 1 / (2 r0)
        rows[i, Coefficient.SAMPLE_TO_X0] = 1 / alpha[i]
        rows[i, Coefficient.NOISE_TO_X0] = -sigma[i] / alpha[i]
        rows[i, Coefficient.SAMPLE] = sigma[i + 1] / sigma[i]
        rows[i, Coefficient.X0] = -alpha[i + 1] * shrink * (1 + half)
        rows[i, Coefficient.LAST_X0] = alpha[i + 1] * shrink * half
        rows[i, Coefficient.GUIDANCE] = guidance_scale
    return rows.float()
