"""Consistency distillation against a NumPy float64 computation, and against data known exactly.

The models here are formulas of x, t, text and size in place of a transformer, so that the oracle
needs nothing of the objective's.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.errors import ConfigError
from pixart_rt.model.embeddings import depatchify
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.lcm import (
    FULL,
    LORA,
    ConsistencyDistillation,
    LcmSettings,
    boundary_scalings,
)
from pixart_rt.training.sample_rng import GUIDANCE, TIMESTEP, UNIFORMS, Draws

BUCKET = Bucket(ratio=0.6, height=48, width=80)  # 3x5 tokens, 6x10 latent pixels
CONFIG = ModelConfig(
    num_layers=1, num_heads=1, head_dim=12, in_channels=3, out_channels=6, caption_channels=5,
    max_text_tokens=4, sample_size=8, micro_conditioning=False,
)  # fmt: skip
DIFFUSION = GaussianDiffusion()
SIGNAL2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # a_t


class Formula(nn.Module):
    """The signature of PixArtTransformer; `predict` gives the noise, the variance is not finite."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def modulator(self, t: Tensor, size: Tensor, aspect_ratio: Tensor) -> Tensor:
        return torch.stack([t, size.sum(1), aspect_ratio], dim=1)[:, :, None]

    def forward(
        self, tokens: Tensor, pos_embed: Tensor, modulation: Tensor, embeds: Tensor, mask: Tensor
    ) -> Tensor:
        rows, columns = BUCKET.grid
        x = depatchify(tokens, BUCKET.grid, 2)
        text = (embeds * mask[..., None]).sum((1, 2)).to(x.dtype)
        t, size, ratio = (each.to(x.dtype) for each in modulation[:, :3, 0].unbind(1))
        noise = self.predict(x, t, text, size * ratio)
        output = torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1)
        patches = output.reshape(len(x), 6, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(len(x), rows * columns, -1)


class Affine(Formula):
    """a x + b text + sin(t / 97) + 1e-4 size: anything that depends on all of them."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def predict(self, x: Tensor, t: Tensor, text: Tensor, size: Tensor) -> Tensor:
        a, b = self.weights
        return a * x + (b * text + torch.sin(t / 97) + 1e-4 * size)[:, None, None, None]


def plain_affine(weights, x, t, text, size):
    return weights[0] * x + weights[1] * text + math.sin(t / 97) + 1e-4 * size


def make_batch(indices: list[int], steps: int, seed: int = 0) -> tuple[Batch, Draws]:
    """A float64 batch whose sample i is at the `indices[i]`-th of `steps` timesteps."""
    random = torch.Generator().manual_seed(seed)
    B = len(indices)
    lengths = torch.randint(1, 5, (B,), generator=random)
    batch = Batch(
        ids=torch.arange(B),
        latents=torch.randn(B, 3, 6, 10, generator=random, dtype=torch.float64) * 1.3 + 0.4,
        prompt_embeds=torch.randn(B, 4, 5, generator=random, dtype=torch.float64),
        prompt_mask=torch.arange(4)[None] < lengths[:, None],
        original_size=torch.randint(30, 90, (B, 2), generator=random).float(),
        aspect_ratio=torch.full((B, 1), BUCKET.ratio),
        bucket=BUCKET,
    )
    uniform = torch.rand(B, UNIFORMS, generator=random, dtype=torch.float64)
    uniform[:, TIMESTEP] = (torch.tensor(indices) + 0.37) / steps
    noise = torch.randn(batch.latents.shape, generator=random, dtype=torch.float64)
    return batch, Draws(noise, uniform)


def make_null(own_mask: bool) -> NullText:
    embeds = torch.randn(4, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return NullText(embeds, torch.arange(4) < 1 if own_mask else None)


def plain_f(eps, x, t):
    """f(x, t) of one sample."""
    skip = 0.5**2 / ((t / 0.1) ** 2 + 0.5**2)
    out = (t / 0.1) / math.sqrt((t / 0.1) ** 2 + 0.5**2)
    return skip * x + out * (x - math.sqrt(1 - SIGNAL2[t]) * eps) / math.sqrt(SIGNAL2[t])


@pytest.mark.parametrize("own_mask", [True, False])
@pytest.mark.parametrize(("steps", "w", "huber_c"), [(50, 4.5, 0.001), (200, 0.7, 0.4)])
def test_the_loss_matches_plain_numpy(own_mask, steps, w, huber_c):
    indices = [0, 1, steps // 3, steps - 2, steps - 1]
    batch, draws = make_batch(indices, steps)
    null = make_null(own_mask)
    settings = LcmSettings(guidance_w=w, num_ddim_timesteps=steps, huber_c=huber_c)
    objective = ConsistencyDistillation(
        Affine(0.3, 0.2), DIFFUSION, null, settings, teacher=Affine(0.6, -0.5)
    )
    with torch.no_grad():
        objective.target.weights.copy_(torch.tensor([0.45, 0.1], dtype=torch.float64))
    found = objective(batch, draws)
    assert set(found) == {"loss", "timesteps"} and found["loss"].shape == (len(indices),)

    for row, index in enumerate(indices):
        k = 1000 // steps
        t = k * (index + 1) - 1
        s = t - k if t >= k else 0
        x0, noise = batch.latents[row].numpy(), draws.noise[row].numpy()
        mask = batch.prompt_mask[row].numpy()
        null_mask = np.array([True, False, False, False]) if own_mask else mask
        text = batch.prompt_embeds[row].numpy()[mask].sum()
        no_text = null.embeds.numpy()[null_mask].sum()
        size = batch.original_size[row].sum().item() * np.float32(0.6)
        x = math.sqrt(SIGNAL2[t]) * x0 + math.sqrt(1 - SIGNAL2[t]) * noise
        with_text = plain_affine([0.6, -0.5], x, t, text, size)
        without = plain_affine([0.6, -0.5], x, t, no_text, size)
        eps = (1 + w) * with_text - w * without
        start = (x - math.sqrt(1 - SIGNAL2[t]) * eps) / math.sqrt(SIGNAL2[t])
        before = math.sqrt(SIGNAL2[s]) * start + math.sqrt(1 - SIGNAL2[s]) * eps
        wanted = plain_f(plain_affine([0.45, 0.1], before, s, text, size), before, s)
        mine = plain_f(plain_affine([0.3, 0.2], x, t, text, size), x, t)
        expected = np.mean(np.sqrt((mine - wanted) ** 2 + huber_c**2) - huber_c)
        assert found["loss"][row].item() == pytest.approx(expected, rel=1e-9)


def test_a_step_draws_nothing_but_its_timestep_and_noise():
    batch, draws = make_batch([3, 20], 50)
    objective = ConsistencyDistillation(Affine(0.3, 0.2), DIFFUSION, make_null(True))
    state = torch.get_rng_state()
    first = objective(batch, draws)["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    draws.uniform[:, TIMESTEP + 1 :] = 0.0  # a share of dropped captions would now be all of them
    assert GUIDANCE > TIMESTEP and torch.equal(objective(batch, draws)["loss"], first)
    alone = objective(batch.rows(1, 2), draws.rows(1, 2))["loss"]
    torch.testing.assert_close(alone, first[1:], rtol=1e-12, atol=0)


def test_the_boundary_is_the_identity_and_the_samplers():
    """c_skip and c_out are those by which diffusers' LCMScheduler samples."""
    from diffusers import LCMScheduler

    t = torch.tensor([0, 1, 19, 499, 999])
    skip, out = (each.flatten() for each in boundary_scalings(t, torch.float64))
    assert (skip[0], out[0]) == (1, 0)
    sampler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    sampler.set_timesteps(4)
    theirs = sampler.get_scalings_for_boundary_condition_discrete(t.double())
    torch.testing.assert_close((skip, out), theirs, rtol=1e-12, atol=0)
    objective = ConsistencyDistillation(Affine(0.3, 0.2), DIFFUSION, make_null(True))
    x = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    batch, _ = make_batch([0, 0], 50)
    assert torch.equal(objective._consistent(objective.model, x, torch.zeros(2).long(), batch), x)


@pytest.mark.parametrize("steps", [50, 100, 250, 1000])
def test_every_timestep_of_the_sampler_is_trained(steps):
    from diffusers import LCMScheduler

    sampler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    seen = set()

    class Watched(Affine):
        def predict(self, x, t, text, size):
            seen.update(t.int().tolist())
            return super().predict(x, t, text, size)

    settings = LcmSettings(num_ddim_timesteps=steps)
    teacher = Watched(0.3, 0.2)
    objective = ConsistencyDistillation(
        Affine(0.3, 0.2), DIFFUSION, make_null(True), settings, teacher=teacher
    )
    objective(*make_batch(list(range(steps)), steps))
    assert min(seen) == 1000 // steps - 1 and max(seen) == 999 and len(seen) == steps
    for count in (1, 2, 3, 4, 7, 8, 50):
        sampler.set_timesteps(count)
        assert seen >= set(sampler.timesteps.tolist())


class Gaussian(Formula):
    """The best noise prediction for latents N(m, spread^2), m the text's number."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def predict(self, x: Tensor, t: Tensor, text: Tensor, size: Tensor) -> Tensor:
        a = torch.from_numpy(SIGNAL2)[t.long()][:, None, None, None]
        m = text[:, None, None, None]
        return self.scale * (1 - a).sqrt() * (x - a.sqrt() * m) / (a * self.spread**2 + 1 - a)


class Solution(Gaussian):
    """The noise prediction by which f(x, t) is the end of the guided teacher's own trajectory.

    Guided, the data of one point at m and at n without text are a point at m + w (m - n); and for
    equal m and n a normal stays one. Along a trajectory (x - signal m) / sqrt(variance) is a
    constant.
    """

    def __init__(self, spread: float, w: float, no_text: float) -> None:
        super().__init__(spread)
        self.w, self.no_text = w, no_text

    def predict(self, x: Tensor, t: Tensor, text: Tensor, size: Tensor) -> Tensor:
        a = torch.from_numpy(SIGNAL2)[t.long()][:, None, None, None]
        first = SIGNAL2[0]
        m = (text + self.w * (text - self.no_text))[:, None, None, None]
        variance, end = (each * self.spread**2 + 1 - each for each in (a, first))
        f = first**0.5 * m + (end / variance).sqrt() * (x - a.sqrt() * m)
        scaled = (10 * t)[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        start = (f - skip * x) / out.clamp(min=1e-9)  # at t = 0 nothing depends on it
        return self.scale * (x - a.sqrt() * start) / (1 - a).sqrt()


def analytic_loss(spread: float, steps: int, w: float, solved_w: float, m: float | None) -> float:
    """Mean loss of the true consistency function, as student and target, at five timesteps."""
    batch, draws = make_batch([0, 1, steps // 2, steps - 2, steps - 1], steps)
    if m is not None:  # the same text everywhere, also where there is none
        batch.prompt_embeds.fill_(0)
        batch.prompt_embeds[:, 0, 0] = m
    null = NullText(batch.prompt_embeds[0], None) if m is not None else make_null(True)
    no_text = m if m is not None else null.embeds[0].sum().item()
    settings = LcmSettings(guidance_w=w, num_ddim_timesteps=steps, huber_c=1e-9)
    objective = ConsistencyDistillation(
        Solution(spread, solved_w, no_text), DIFFUSION, null, settings, teacher=Gaussian(spread)
    )
    return objective(batch, draws)["loss"].mean().item()


def test_the_true_consistency_function_of_points_has_no_loss():
    """For one point per text DDIM is exact at any stride, so signs and schedules show."""
    assert analytic_loss(0.0, 50, w=4.5, solved_w=4.5, m=None) < 1e-12
    assert analytic_loss(0.0, 50, w=0.0, solved_w=0.0, m=None) < 1e-12
    for wrong in (3.5, 5.5, -4.5):  # cond + (w - 1), + (w + 1) or - w times the difference
        assert analytic_loss(0.0, 50, w=4.5, solved_w=wrong, m=None) > 0.1


def test_the_true_consistency_function_of_a_normal_has_less_loss_at_finer_strides():
    """DDIM is of first order: its error over one step falls with the stride's square."""
    coarse, fine, finest = (
        analytic_loss(0.7, steps, w=4.5, solved_w=4.5, m=0.8) for steps in (50, 250, 1000)
    )
    assert 1e-4 < coarse < 0.01
    assert coarse / fine == pytest.approx(25, rel=0.15)
    assert fine / finest == pytest.approx(16, rel=0.15)


def test_only_the_student_is_trained_and_the_target_follows():
    student = Affine(0.3, 0.2)
    given = student.weights.detach().clone()
    objective = ConsistencyDistillation(student, DIFFUSION, make_null(True))
    batch, draws = make_batch([4, 30, 49], 50)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    expected = given.numpy().copy()
    for _ in range(4):
        objective(batch, draws)["loss"].mean().backward()
        assert student.weights.grad.abs().min() > 0
        assert objective.teacher.weights.grad is None and objective.target.weights.grad is None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(torch.zeros(()))
        expected = 0.95 * expected + 0.05 * student.weights.detach().numpy()
        np.testing.assert_allclose(objective.target.weights.numpy(), expected, rtol=1e-12)
    assert torch.equal(objective.teacher.weights, given)
    assert not torch.allclose(objective.target.weights, given, atol=1e-3)
    assert len(objective.units) == 3


def test_no_gradient_runs_through_the_target():
    """The gradient is that of the loss to a constant target, by central differences."""
    batch, draws = make_batch([10, 40], 50)
    settings = LcmSettings(target_decay=0.0)

    def loss(weights, wanted_of):
        objective = ConsistencyDistillation(
            Affine(*weights), DIFFUSION, make_null(True), settings, teacher=Affine(0.6, -0.5)
        )
        objective.target = wanted_of
        return objective(batch, draws)["loss"].mean().item()

    student = Affine(0.3, 0.2)
    objective = ConsistencyDistillation(
        student, DIFFUSION, make_null(True), settings, teacher=Affine(0.6, -0.5)
    )
    assert objective.target is None and len(objective.units) == 2
    objective.after_step(torch.zeros(()))  # nothing to move
    objective(batch, draws)["loss"].mean().backward()
    frozen = deepcopy(student)
    for i in range(2):
        up, down = [0.3, 0.2], [0.3, 0.2]
        up[i], down[i] = up[i] + 1e-6, down[i] - 1e-6
        slope = (loss(up, frozen) - loss(down, frozen)) / 2e-6
        assert student.weights.grad[i].item() == pytest.approx(slope, rel=1e-4)


class Adapted(Affine):
    """Weights and an adapter that is added to them while it is on."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__(a, b)
        self.weights.requires_grad_(False)
        self.delta = nn.Parameter(torch.tensor([0.02, -0.03], dtype=torch.float64))
        self.on = True

    @contextmanager
    def off(self):
        self.on = False
        yield
        self.on = True

    def predict(self, x: Tensor, t: Tensor, text: Tensor, size: Tensor) -> Tensor:
        a, b = self.weights + self.delta if self.on else self.weights
        return a * x + (b * text + torch.sin(t / 97) + 1e-4 * size)[:, None, None, None]


def test_an_adapter_that_is_switched_off_is_the_teacher():
    batch, draws = make_batch([0, 17, 49], 50)
    adapted = Adapted(0.6, -0.5)
    objective = ConsistencyDistillation(
        adapted, DIFFUSION, make_null(False), LORA, adapter_off=adapted.off
    )
    apart = ConsistencyDistillation(
        Affine(0.62, -0.53), DIFFUSION, make_null(False), LcmSettings(target_decay=0.0),
        teacher=Affine(0.6, -0.5),
    )  # fmt: skip
    found, expected = objective(batch, draws)["loss"], apart(batch, draws)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(adapted.delta.grad, apart.model.weights.grad, rtol=1e-9, atol=0)
    assert adapted.weights.grad is None and adapted.on
    assert objective.teacher is None and objective.target is None and len(objective.units) == 1


def test_the_loss_of_half_precision_outputs_is_float32():
    batch, draws = make_batch([0, 30, 49], 50)
    single = replace(batch, latents=batch.latents.float(), prompt_embeds=batch.prompt_embeds.half())

    class Half(Affine):
        def predict(self, x, t, text, size):
            return super().predict(x, t, text, size).bfloat16()

    draws = Draws(draws.noise.float(), draws.uniform)
    objective = ConsistencyDistillation(Half(0.3, 0.2), DIFFUSION, make_null(True))
    loss = objective(single, draws)["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_w": -1.0}, "guidance_w must be >= 0"),
        ({"num_ddim_timesteps": 40}, "multiple of 50"),
        ({"num_ddim_timesteps": 0}, "multiple of 50"),
        ({"huber_c": 0.0}, "huber_c must be > 0"),
        ({"target_decay": 1.0}, r"in \[0, 1\)"),
        ({"lora_rank": 0, "target_decay": 0.0}, "must be positive"),
        ({"lora_rank": 8}, "target_decay to 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LcmSettings(**values)


def test_parts_that_do_not_go_together_are_refused():
    null, adapted = make_null(True), Adapted(0.6, -0.5)
    with pytest.raises(ConfigError, match="without an adapter"):
        ConsistencyDistillation(Affine(1, 1), DIFFUSION, null, LORA)
    with pytest.raises(ConfigError, match="with an adapter"):
        ConsistencyDistillation(adapted, DIFFUSION, null, FULL, adapter_off=adapted.off)
    with pytest.raises(ConfigError, match="not both"):
        ConsistencyDistillation(
            adapted, DIFFUSION, null, LORA, teacher=Affine(1, 1), adapter_off=adapted.off
        )
    student = Affine(1, 1)
    shared = Affine(1, 1)
    shared.weights.data = student.weights.data
    for teacher in (student, shared):
        with pytest.raises(ConfigError, match="shares its weights"):
            ConsistencyDistillation(student, DIFFUSION, null, teacher=teacher)
    with pytest.raises(ConfigError, match="does not divide the 999"):
        ConsistencyDistillation(Affine(1, 1), GaussianDiffusion(999), null)
    with pytest.raises(ConfigError, match=r"torch\.bfloat16 weights"):
        ConsistencyDistillation(Affine(1, 1).bfloat16(), DIFFUSION, null)


def test_the_presets_are_the_published_ones():
    assert (FULL.guidance_w, FULL.num_ddim_timesteps, FULL.huber_c) == (4.5, 50, 0.001)
    assert (FULL.target_decay, FULL.lora_rank) == (0.95, None)
    assert (LORA.target_decay, LORA.lora_rank) == (0.0, 32)
