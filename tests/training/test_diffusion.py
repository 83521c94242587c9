"""GaussianDiffusion against a second computation in float64 that loops over single values.

The oracle shares nothing with the module: betas multiplied one by one, the KL as
torch.distributions computes it, the decoder's mass from torch.special.ndtr.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pixart_rt.training.diffusion import GaussianDiffusion

TIMESTEPS = [0, 1, 2, 17, 500, 998, 999]


def schedule() -> tuple[list[float], list[float]]:
    """(beta_t, a_t) in Python floats."""
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    return betas, kept


def expected_losses(
    output: torch.Tensor, x0: torch.Tensor, t: int, noise: torch.Tensor
) -> tuple[float, float]:
    """(mse, vb) of one sample [C, h, w], all float64."""
    betas, kept = schedule()
    before = kept[t - 1] if t else 1.0
    predicted, raw = output[: x0.shape[0]], output[x0.shape[0] :]
    x_t = math.sqrt(kept[t]) * x0 + math.sqrt(1 - kept[t]) * noise
    guess = (x_t - math.sqrt(1 - kept[t]) * predicted) / math.sqrt(kept[t])

    def posterior_mean(start: torch.Tensor) -> torch.Tensor:
        weight = betas[t] * math.sqrt(before) / (1 - kept[t])
        return weight * start + (1 - before) * math.sqrt(1 - betas[t]) / (1 - kept[t]) * x_t

    last = max(t, 1)  # the variance at t = 0 is that of t = 1, whose logarithm exists
    variance = betas[last] * (1 - kept[last - 1]) / (1 - kept[last])
    share = (raw + 1) / 2
    scale = torch.exp(0.5 * (share * math.log(betas[t]) + (1 - share) * math.log(variance)))
    model = Normal(posterior_mean(guess), scale)
    if t == 0:
        high = torch.special.ndtr((x0 + 1 / 255 - model.loc) / scale)
        low = torch.special.ndtr((x0 - 1 / 255 - model.loc) / scale)
        high = torch.where(x0 > 0.999, torch.ones_like(high), high)
        low = torch.where(x0 < -0.999, torch.zeros_like(low), low)
        nats = -(high - low).clamp(min=1e-12).log()
    else:
        truth = Normal(posterior_mean(x0), torch.full_like(x0, math.sqrt(variance)))
        nats = kl_divergence(truth, model)
    return ((noise - predicted) ** 2).mean().item(), nats.mean().item() / math.log(2)


@pytest.fixture
def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = len(TIMESTEPS)
    noise = torch.randn(batch, 4, 5, 3, generator=generator)
    return {
        "x_start": torch.randn(batch, 4, 5, 3, generator=generator) * 0.7,  # some beyond +-1
        "noise": noise,
        "model_output": torch.cat(
            [
                noise + 0.1 * torch.randn(noise.shape, generator=generator),
                torch.randn(noise.shape, generator=generator),
            ],
            dim=1,
        ),
        "t": torch.tensor(TIMESTEPS),
    }


def test_losses_match_the_float64_oracle(sample):
    losses = GaussianDiffusion().training_losses(**sample)
    for index, t in enumerate(TIMESTEPS):
        mse, vb = expected_losses(
            sample["model_output"][index].double(),
            sample["x_start"][index].double(),
            t,
            sample["noise"][index].double(),
        )
        assert losses["mse"][index].item() == pytest.approx(mse, rel=1e-5)
        assert losses["vb"][index].item() == pytest.approx(vb, rel=2e-2 if t == 0 else 2e-3), t
        assert losses["loss"][index].item() == pytest.approx(
            (losses["mse"] + losses["vb"])[index].item(), rel=1e-6
        )


def test_losses_are_float32_per_sample(sample):
    sample["model_output"] = sample["model_output"].bfloat16()
    losses = GaussianDiffusion().training_losses(**sample)
    assert set(losses) == {"loss", "mse", "vb"}
    for loss in losses.values():
        assert loss.shape == (len(TIMESTEPS),) and loss.dtype == torch.float32


def test_bound_trains_only_the_variance_half(sample):
    output = sample["model_output"].requires_grad_()
    GaussianDiffusion().training_losses(**sample)["vb"].sum().backward()
    noise_half, variance_half = output.grad.chunk(2, dim=1)
    assert not noise_half.any() and variance_half.abs().min() > 0


def test_mse_trains_only_the_noise_half(sample):
    output = sample["model_output"].requires_grad_()
    GaussianDiffusion().training_losses(**sample)["mse"].sum().backward()
    noise_half, variance_half = output.grad.chunk(2, dim=1)
    assert not variance_half.any() and noise_half.any()


def test_q_sample_matches_the_oracle(sample):
    _, kept = schedule()
    x_t = GaussianDiffusion().q_sample(sample["x_start"], sample["t"], sample["noise"])
    for index, t in enumerate(TIMESTEPS):
        signal = math.sqrt(kept[t]) * sample["x_start"][index].double()
        expected = signal + math.sqrt(1 - kept[t]) * sample["noise"][index].double()
        torch.testing.assert_close(x_t[index].double(), expected, atol=1e-6, rtol=1e-5)
