"""The fused guidance and DPM-Solver++ step against its formula and against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pixart_rt.config import Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.inference.schedulers import dpmpp_coefficients, make_scheduler
from pixart_rt.kernels import solver as op
from pixart_rt.model.embeddings import patchify, unpatchify


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, variance, guided, device, error):
    random = torch.Generator().manual_seed(0)
    output = torch.randn(6 if guided else 3, 37, 32 if variance else 16, generator=random).to(dtype)
    x, x0_last = torch.randn(2, 3, 37, 16, generator=random).unbind()
    coefficients = torch.randn(8, generator=random)
    tensors = [each.to(device) for each in (output, x, x0_last, coefficients)]
    actual = op.cfg_dpmpp_step(*tensors, 4)
    expected = op.cfg_dpmpp_step_ref(
        output.double(), x.double(), x0_last.double(), coefficients.double(), 4
    )
    assert error(actual[0], expected[0]) < 1e-6
    assert error(actual[1], expected[1]) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20, 50])
def test_every_step_is_the_one_of_diffusers(steps, device, tmp_path):
    """Latents through diffusers' scheduler, tokens through ours, the same outputs of the model."""
    scheduler = make_scheduler(Scheduler.DPM_SOLVER, tmp_path)
    scheduler.set_timesteps(steps)
    rows = dpmpp_coefficients(scheduler, 4.5).to(device)
    random = torch.Generator().manual_seed(steps)
    latents = torch.randn(1, 4, 6, 10, generator=random)
    x = x0_last = patchify(latents, 2).to(device)
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(2, 15, 32, generator=random)
        null, cond = unpatchify(output, (3, 5), 2)[:, :4].chunk(2)
        noise = null + 4.5 * (cond - null)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        x, x0_last = op.cfg_dpmpp_step(output.to(device), x, x0_last, rows[step], 4)
        difference = (x.cpu() - patchify(latents, 2)).abs().max()
        assert difference < 2e-5 * latents.abs().max()


def test_other_solvers_are_refused():
    scheduler = DPMSolverMultistepScheduler(solver_order=3)
    scheduler.set_timesteps(5)
    with pytest.raises(ConfigError, match="solver_order"):
        dpmpp_coefficients(scheduler, 4.5)


def test_registration(device):
    arguments = op._example(device, torch.float16, 0)
    torch.library.opcheck(torch.ops.pixart_rt.cfg_dpmpp_step.default, arguments)
