"""The noise levels of DPM-Solver++ and the scheduler configuration. Oracle: diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pixart_rt.checkpoints.scheduler_config import CONFIG, SchedulerSettings
from pixart_rt.config import Scheduler
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.inference.request_plan import PlanKey, Planner
from pixart_rt.inference.schedulers import (
    alphas_cumprod,
    dpmpp_coefficients,
    dpmpp_levels,
    make_scheduler,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trailing": {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "given betas": {"trained_betas": [0.001 + 0.00001 * i for i in range(500)],
                    "num_train_timesteps": 500},
    "zero SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "karras, cosine": {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    "exponential": {"use_exponential_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "euler": {"euler_at_final": True, "lower_order_final": False},
}  # fmt: skip
STEPS = (1, 2, 3, 7, 14, 15, 20, 33, 50, 100, 249, 333, 500, 998, 999)


def folder_with(tmp_path: Path, **settings: Any) -> Path:
    settings = {"_class_name": "DPMSolverMultistepScheduler", **settings}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("name", VARIANTS)
def test_noise_levels_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    """Equal to the last bit: the same operations in the same order."""
    settings = SchedulerSettings.read(folder_with(tmp_path, **VARIANTS[name]))
    scheduler = DPMSolverMultistepScheduler(**VARIANTS[name])
    assert torch.equal(alphas_cumprod(settings), scheduler.alphas_cumprod)
    for steps in STEPS:
        if steps >= settings["num_train_timesteps"]:
            continue
        scheduler.set_timesteps(steps)
        levels = dpmpp_levels(settings, steps)
        assert torch.equal(levels.timesteps, scheduler.timesteps), steps
        assert torch.equal(levels.sigmas, scheduler.sigmas), steps
        if steps < 100:
            rows = dpmpp_coefficients(scheduler, 4.5)
            assert torch.equal(dpmpp_coefficients(levels, 4.5).nan_to_num(), rows.nan_to_num())


def test_every_step_count_of_pixart_is_that_of_diffusers(tmp_path: Path) -> None:
    settings = SchedulerSettings.read(tmp_path)
    scheduler = make_scheduler(Scheduler.DPM_SOLVER, tmp_path)
    for steps in range(1, 1000, 7):
        scheduler.set_timesteps(steps)
        levels = dpmpp_levels(settings, steps)
        assert torch.equal(levels.timesteps, scheduler.timesteps), steps
        assert torch.equal(levels.sigmas, scheduler.sigmas), steps


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEuler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0; it must be"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting",
        ),
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler", "use_karras_sigmas": True},
            "only one can be",
        ),
        ({"_class_name": ["PNDMScheduler"]}, "none of our samplers"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"beta_schedule": "sigmoid"}, "one of linear, scaled_linear"),
        ({"beta_end": 2}, "beta_end is 2; it must be between 0 and 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "above beta_end"),
        ({"num_train_timesteps": 10.5}, "a count"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
        ({"solver_order": 4}, "1, 2 or 3"),
        ({"algorithm_type": "euler"}, "algorithm_type is 'euler'"),
        ({"algorithm_type": "dpmsolver"}, "sigma_min"),
        ({"use_karras_sigmas": "yes"}, "a boolean"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, "only one"),
        ({"timestep_spacing": "cubic"}, "linspace"),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_read(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        SchedulerSettings.read(folder)
    with pytest.raises(CheckpointError, match=message):
        make_scheduler(Scheduler.DPM_SOLVER, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=CONFIG):
        SchedulerSettings.read(tmp_path)


@pytest.mark.parametrize("name", [Scheduler.DDIM, Scheduler.IDDPM, Scheduler.LCM])
def test_every_sampler_has_the_models_training_schedule(name: Scheduler, tmp_path: Path) -> None:
    trained = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
               "num_train_timesteps": 500, "beta_end": 0.03}  # fmt: skip
    config = make_scheduler(name, folder_with(tmp_path, **trained)).config
    assert {key: config[key] for key in trained} == trained


@pytest.mark.parametrize("name", [Scheduler.SA_SOLVER, Scheduler.DMD])
def test_samplers_without_zero_terminal_snr_refuse_it(name: Scheduler, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        make_scheduler(name, folder_with(tmp_path, rescale_betas_zero_snr=True))


def test_dmd_refuses_a_model_that_predicts_velocity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="v_prediction"):
        make_scheduler(Scheduler.DMD, folder_with(tmp_path, prediction_type="v_prediction"))


def test_velocity_is_not_taken_for_noise(tmp_path: Path) -> None:
    """The fused solver predicts noise; diffusers' own steps run instead."""
    settings = SchedulerSettings.read(folder_with(tmp_path, prediction_type="v_prediction"))
    with pytest.raises(ConfigError, match="v_prediction"):
        dpmpp_coefficients(dpmpp_levels(settings, 5), 1.0)
    assert make_scheduler(Scheduler.DPM_SOLVER, tmp_path).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["SASolverScheduler", "UniPCMultistepScheduler"])
def test_the_files_of_other_samplers_are_taken_over(name: str, tmp_path: Path) -> None:
    import diffusers

    getattr(diffusers, name)(beta_end=0.03).save_pretrained(tmp_path)
    scheduler = make_scheduler(Scheduler.DPM_SOLVER, tmp_path)
    scheduler.set_timesteps(7)
    levels = dpmpp_levels(SchedulerSettings.read(tmp_path), 7)
    assert torch.equal(levels.sigmas, scheduler.sigmas)
    assert torch.equal(dpmpp_coefficients(levels, 1.0), dpmpp_coefficients(scheduler, 1.0))


def test_the_file_is_read_once(tmp_path: Path) -> None:
    """A plan made after the file is gone is the one made before."""
    from pixart_rt.buckets import nearest_bucket
    from pixart_rt.config import ModelConfig
    from pixart_rt.model.transformer import Modulator

    config = ModelConfig(sample_size=32, num_layers=1, num_heads=1, micro_conditioning=False)
    modulator = Modulator(config).eval().requires_grad_(False)
    folder = folder_with(tmp_path, use_karras_sigmas=True)
    planner = Planner(modulator, config, folder, torch.device("cpu"))
    (folder / CONFIG).unlink()
    plan = planner(PlanKey(Scheduler.DPM_SOLVER, 7, (nearest_bucket(256, 1, 1),)))
    expected = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    expected.set_timesteps(7)
    assert torch.equal(plan.timesteps, expected.timesteps)
    assert plan.coefficients is not None
    assert torch.equal(plan.coefficients, dpmpp_coefficients(expected, 1.0))
    assert planner.solver(plan.key).config.use_karras_sigmas


FLOWS: dict[str, dict[str, Any]] = {
    "euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "heun": {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 1.5},
    "dpm": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_matching_model_is_sampled_on_its_own_sigmas(name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, **FLOWS[name])
    shift = FLOWS[name].get("shift", FLOWS[name].get("flow_shift"))
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler = make_scheduler(Scheduler.DPM_SOLVER, folder)
    levels = dpmpp_levels(SchedulerSettings.read(folder), 7)
    theirs.set_timesteps(7)
    assert torch.equal(levels.timesteps, theirs.timesteps)
    assert torch.equal(levels.sigmas, theirs.sigmas)
    with pytest.raises(ConfigError, match="flow_prediction"):  # diffusers' own steps run instead
        dpmpp_coefficients(levels, 1.0)
    # The velocity of a straight path leads from any noise to the data: x_s = (1 - s) x_0 + s n.
    random = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 1, 4, 4, 4, generator=random)
    scheduler.set_timesteps(7)
    first = scheduler.sigmas[0]
    latents = (1 - first) * data + first * noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(noise - data, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, data, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [each for each in Scheduler if each is not Scheduler.DPM_SOLVER])
@pytest.mark.parametrize("flow", FLOWS)
def test_other_samplers_refuse_a_flow_matching_model(
    name: Scheduler, flow: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"flow-matching model.*use dpm-solver\+\+"):
        make_scheduler(name, folder_with(tmp_path, **FLOWS[flow]))
