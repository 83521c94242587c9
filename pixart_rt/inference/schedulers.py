"""The samplers by name: DPM-Solver++'s noise levels and coefficients, diffusers' other schedulers.

All share the checkpoint's training schedule (checkpoints/scheduler_config.json is read there once;
without one, linear betas 1e-4 to 0.02 over 1000 timesteps, as in DiT). What DPM-Solver++ needs on
tokens (kernels/solver.py) is computed here, with the roundings of diffusers, whose import takes
seconds; diffusers is loaded for the other samplers and for other variants of DPM-Solver. Timesteps
and coefficients stay on the CPU, so that stepping never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.checkpoints.scheduler_config import LCM_CLASS, SOLVER, SchedulerSettings
from pixart_rt.config import Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.kernels.solver import ROW, Coefficient
from pixart_rt.torchao_import import quiet_imports

DMD_TIMESTEP = 400  # at which PixArt-Alpha-DMD-XL-2-512x512 was trained and is called
KARRAS_RHO = 7.0  # of arXiv:2206.00364
SMALLEST_ALPHA = 2**-24  # of zero terminal SNR: the first sigma must not be infinite
Array = npt.NDArray[Any]


def make_scheduler(name: Scheduler, folder: Path) -> Any:
    """A fresh diffusers scheduler, on the schedule of the folder's scheduler_config.json, if any.

    Raises CheckpointError and ConfigError as `scheduler_of` and the settings do.
    """
    return scheduler_of(name, SchedulerSettings.read(folder))


def scheduler_of(name: Scheduler, settings: SchedulerSettings) -> Any:
    """A fresh diffusers scheduler of these settings.

    DPM-Solver++ takes the whole configuration, so that it is what diffusers would run. Raises
    ConfigError for a sampler that cannot run such a model.
    """
    with quiet_imports():
        import diffusers

    if name is Scheduler.DPM_SOLVER:
        return diffusers.DPMSolverMultistepScheduler.from_config(settings.for_diffusers)
    if settings.is_flow:
        raise ConfigError(
            f"{name} was requested, but {settings.source} is of a flow-matching model, which it "
            f"cannot run; use {Scheduler.DPM_SOLVER}"
        )
    if name is Scheduler.LCM and settings.class_name == LCM_CLASS:
        return diffusers.LCMScheduler.from_config(dict(settings.stored))
    schedule = settings.training
    makers: dict[Scheduler, Callable[[], Any]] = {
        Scheduler.SA_SOLVER: lambda: _sa_solver(diffusers.SASolverScheduler, settings),
        Scheduler.DDIM: lambda: diffusers.DDIMScheduler(clip_sample=False, **schedule),
        Scheduler.IDDPM: lambda: diffusers.DDPMScheduler(
            variance_type="learned_range", clip_sample=False, **schedule
        ),
        Scheduler.LCM: lambda: diffusers.LCMScheduler(clip_sample=False, **schedule),
        Scheduler.DMD: lambda: _one_step(settings),
    }
    return makers[name]()


def _sa_solver(kind: Callable[..., Any], settings: SchedulerSettings) -> Any:
    schedule = settings.training
    if schedule.pop("rescale_betas_zero_snr"):
        raise ConfigError(
            f"sa-solver was requested, but {settings.source} has rescale_betas_zero_snr, which it "
            "cannot run; use dpm-solver++ or ddim"
        )
    return kind(
        algorithm_type="data_prediction",
        tau_func=lambda t: 1 if 200 <= t <= 800 else 0,  # as in the original PixArt code
        predictor_order=2,
        corrector_order=2,
        **schedule,
    )


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


def _one_step(settings: SchedulerSettings) -> OneStep:
    expected = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    other = {key: settings[key] for key in expected if settings[key] != expected[key]}
    if other or settings["num_train_timesteps"] <= DMD_TIMESTEP:
        raise ConfigError(
            "dmd was requested, which is for students that predict noise at timestep "
            f"{DMD_TIMESTEP}, but {settings.source} is of another model {other or ''}; use "
            "dpm-solver++"
        )
    return OneStep(alphas_cumprod(settings))


def uses_learned_variance(name: Scheduler) -> bool:
    """Whether the sampler takes the model's variance channels; the others drop them."""
    return name is Scheduler.IDDPM


def alphas_cumprod(settings: SchedulerSettings) -> Tensor:
    """The signal's share of the variance at every training timestep, [1000] float32."""
    steps, first, last = (
        settings[key] for key in ("num_train_timesteps", "beta_start", "beta_end")
    )
    kind = settings["beta_schedule"]
    if settings["trained_betas"] is not None:
        betas = torch.tensor(settings["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float32) ** 2
    else:
        shares = [
            math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)
        ]
        each = [min(1 - shares[i + 1] / shares[i], 0.999) for i in range(steps)]
        betas = torch.tensor(each, dtype=torch.float32)
    if not settings["rescale_betas_zero_snr"]:
        return torch.cumprod(1 - betas, dim=0)
    # arXiv:2305.08891, Algorithm 1
    roots = torch.cumprod(1 - betas, dim=0).sqrt()
    start, end = roots[0].clone(), roots[-1].clone()
    roots = (roots - end) * (start / (start - end))
    squares = roots**2
    alphas = torch.cat([squares[:1], squares[1:] / squares[:-1]])
    shares_left = torch.cumprod(1 - (1 - alphas), dim=0)  # through the betas, as diffusers rounds
    shares_left[-1] = SMALLEST_ALPHA
    return shares_left


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """The steps of DPM-Solver++ and its settings; named as diffusers' scheduler names them."""

    timesteps: Tensor  # [S] int64
    sigmas: Tensor  # [S + 1] float32, noise over signal
    config: Mapping[str, Any]


def dpmpp_levels(settings: SchedulerSettings, num_steps: int) -> NoiseLevels:
    """The noise levels of DPM-Solver++ in `num_steps` steps, equal to diffusers'."""
    rare = ("exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")
    if any(settings[f"use_{kind}"] for kind in rare):
        scheduler = scheduler_of(Scheduler.DPM_SOLVER, settings)  # not written again
        scheduler.set_timesteps(num_steps, device="cpu")
        return NoiseLevels(scheduler.timesteps, scheduler.sigmas, scheduler.config)
    alphas = alphas_cumprod(settings)
    trained = np.array(((1 - alphas) / alphas) ** 0.5)  # [1000], rising
    if settings["use_karras_sigmas"]:
        sigmas = _karras(trained, num_steps)
        steps = _timesteps_of(sigmas, trained)
        if settings["beta_schedule"] != "squaredcos_cap_v2":
            steps = steps.round()
    else:
        steps = _spaced(settings, alphas, num_steps)
        sigmas = np.interp(steps, np.arange(len(trained)), trained)
    smallest = ((1 - alphas[0]) / alphas[0]) ** 0.5
    last = 0.0 if settings["final_sigmas_type"] == "zero" else smallest
    return NoiseLevels(
        torch.from_numpy(steps).to(torch.int64),
        torch.from_numpy(np.concatenate([sigmas, [last]]).astype(np.float32)),
        {key: settings[key] for key in ("prediction_type", *SOLVER)},
    )


def _spaced(settings: SchedulerSettings, alphas: Tensor, num_steps: int) -> Array:
    """Timesteps [S] by the spacings of arXiv:2305.08891, Table 2."""
    lam = alphas.sqrt().log() - (1 - alphas).sqrt().log()
    clipped = torch.searchsorted(lam.flip(0), settings["lambda_min_clipped"])
    total = settings["num_train_timesteps"]
    stop = total - int(clipped)
    spacing = settings["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, stop - 1, num_steps + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        ratio = stop // (num_steps + 1)
        steps = (np.arange(num_steps + 1) * ratio)[::-1][:-1]
        return steps.astype(np.int64) + settings["steps_offset"]
    return np.arange(stop, 0, -(total / num_steps)).round().astype(np.int64) - 1


def _karras(trained: Array, num_steps: int) -> Array:
    """Sigmas [S] whose seventh roots are evenly spaced (arXiv:2206.00364, equation 5)."""
    smallest, largest = trained[0].item(), trained[-1].item()
    low, high = smallest ** (1 / KARRAS_RHO), largest ** (1 / KARRAS_RHO)
    ramp = np.linspace(0, 1, num_steps)
    levels: Array = (high + ramp * (low - high)) ** KARRAS_RHO
    return levels


def _timesteps_of(sigmas: Array, trained: Array) -> Array:
    """Where sigmas [S] lie among the trained ones, in timesteps: linear in log sigma."""
    logs = np.log(trained)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    below = np.cumsum(wanted - logs[:, None] >= 0, axis=0).argmax(axis=0).clip(max=len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    share = np.clip((low - wanted) / (low - high), 0, 1)
    steps: Array = (1 - share) * below + share * (below + 1)
    return steps


def dpmpp_coefficients(levels: NoiseLevels | Any, guidance_scale: float) -> Tensor:
    """The rows [S, 8] of kernels/solver.py, float32.

    levels: or a diffusers scheduler with its timesteps set. In float64; the last step, and with
    fewer than 15 the first, are of first order, as in diffusers. Raises ConfigError for another
    solver than DPM-Solver++ 2M with midpoint that predicts noise.
    """
    config = levels.config
    expected = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
                "prediction_type": "epsilon", "thresholding": False}  # fmt: skip
    other = {key: config[key] for key in expected if config[key] != expected[key]}
    if other:
        raise ConfigError(f"the fused solver is DPM-Solver++ 2M midpoint, asked was {other}")
    sigmas = levels.sigmas.double()  # in units of the signal: alpha = 1 / sqrt(1 + sigma^2)
    alpha = 1 / (1 + sigmas**2).sqrt()
    sigma = sigmas * alpha
    lam = alpha.log() - sigma.log()  # inf at the end, where no noise is left
    steps = len(levels.timesteps)
    rows = torch.zeros(steps, ROW, dtype=torch.float64)
    for i in range(steps):
        shrink = torch.expm1(-(lam[i + 1] - lam[i]))
        last = i == steps - 1 and (
            config["euler_at_final"]
            or (config["lower_order_final"] and steps < 15)
            or config["final_sigmas_type"] == "zero"
        )
        half: Any = 0.0
        if i > 0 and not last:
            half = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])  # 1 / (2 r0)
        rows[i, Coefficient.SAMPLE_TO_X0] = 1 / alpha[i]
        rows[i, Coefficient.NOISE_TO_X0] = -sigma[i] / alpha[i]
        rows[i, Coefficient.SAMPLE] = sigma[i + 1] / sigma[i]
        rows[i, Coefficient.X0] = -alpha[i + 1] * shrink * (1 + half)
        rows[i, Coefficient.LAST_X0] = alpha[i + 1] * shrink * half
        rows[i, Coefficient.GUIDANCE] = guidance_scale
    return rows.float()
