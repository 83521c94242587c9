"""GaussianDiffusion against a second computation in float64, one sample after the other.

The oracle is written from the papers (DDPM, arXiv:2006.11239; Improved DDPM, arXiv:2102.09672) and
shares nothing with the module: betas multiplied one by one, the KL as torch.distributions computes
it, the decoder's mass from GELU's approximation of the normal's distribution function.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pixart_rt.errors import ConfigError
from pixart_rt.training.diffusion import GaussianDiffusion, normal_cdf

TIMESTEPS = [0, 1, 2, 17, 500, 998, 999]


def schedule() -> tuple[list[float], list[float]]:
    """(beta_t, a_t) in Python floats."""
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    return betas, kept


def gelu_cdf(x: torch.Tensor) -> torch.Tensor:
    """GELU(x) / x in its tanh form: the distribution function that the original trains with."""
    return torch.nn.functional.gelu(x, approximate="tanh") / x


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
        high = gelu_cdf((x0 + 1 / 255 - model.loc) / scale)
        low = gelu_cdf((x0 - 1 / 255 - model.loc) / scale)
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


def oracle(sample):
    """(mse [B], vb [B]) in float64."""
    rows = [
        expected_losses(
            sample["model_output"][index].double(),
            sample["x_start"][index].double(),
            int(t),
            sample["noise"][index].double(),
        )
        for index, t in enumerate(sample["t"])
    ]
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def test_every_term_matches_the_float64_oracle(sample):
    """In float32 to 1e-5, the project's bound; the largest difference is 1e-6, at t = 0."""
    losses = GaussianDiffusion().training_losses(**sample)
    mse, vb = oracle(sample)
    for name, expected in {"mse": mse, "vb": vb, "loss": mse + vb}.items():
        torch.testing.assert_close(losses[name].double(), expected, atol=1e-5, rtol=1e-5)
    assert vb[0] > 0.5, "the decoder's term is there, and large enough to be compared"


def test_every_timestep_matches_in_float64(sample):
    """Where no digits are lost the two computations agree, each of the 1000 steps alone."""
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(1000)
    x_start, noise, raw = torch.randn(3, 1000, 4, 2, 3, generator=generator, dtype=torch.float64)
    output = torch.cat([noise + 0.3 * x_start.flip(0), raw], dim=1)
    wide = {"x_start": x_start, "noise": noise, "model_output": output, "t": t}
    losses = GaussianDiffusion().training_losses(**wide)
    mse, vb = oracle(wide)
    assert losses["vb"].dtype == torch.float64
    torch.testing.assert_close(losses["mse"], mse, atol=0, rtol=1e-12)
    # t = 0 subtracts two masses near each other, the KL terms near 1: about 1e-11 remains.
    torch.testing.assert_close(losses["vb"], vb, atol=1e-10, rtol=1e-8)


def test_the_outermost_bins_reach_to_infinity(sample):
    """At t = 0 values beyond +-0.999 have the whole tail; the oracle knows it as a mass of 1."""
    sample = {name: tensor[:2].clone() for name, tensor in sample.items()}
    sample["t"] = torch.tensor([0, 0])
    sample["x_start"][0], sample["x_start"][1] = 1.0, -1.0
    sample["model_output"] = sample["model_output"] * 0.01  # far from the noise: narrow bins differ
    sample["noise"] = sample["noise"] * 0.01
    torch.testing.assert_close(
        GaussianDiffusion().training_losses(**sample)["vb"].double(),
        oracle(sample)[1],
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_normal_is_the_originals_approximation():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    torch.testing.assert_close(normal_cdf(x[x != 0]), gelu_cdf(x[x != 0]), atol=1e-14, rtol=0)
    gap = (normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-4 < gap < 3e-4, "it is not the exact function"


def test_min_snr_weights_the_noise_error_alone(sample):
    """min(snr, 5) / snr, from the schedule multiplied one by one."""
    plain = GaussianDiffusion().training_losses(**sample)
    losses = GaussianDiffusion(min_snr_gamma=5.0).training_losses(**sample)
    _, kept = schedule()
    snr = [kept[t] / (1 - kept[t]) for t in TIMESTEPS]
    weight = torch.tensor([min(each, 5.0) / each for each in snr])
    assert weight[0] < 1e-3 and weight[-1] == 1
    for name in ("mse", "vb"):
        assert torch.equal(losses[name], plain[name])
    torch.testing.assert_close(losses["loss"], weight * plain["mse"] + plain["vb"])


def test_a_mistaken_shape_or_setting_is_one_line(sample):
    with pytest.raises(ConfigError, match=r"model output of \[7, 4, 5, 3\]; it must be \[7, 8"):
        GaussianDiffusion().training_losses(
            sample["model_output"][:, :4], sample["x_start"], sample["t"], sample["noise"]
        )
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        GaussianDiffusion(min_snr_gamma=0)
    with pytest.raises(ConfigError, match="rise within"):
        GaussianDiffusion(beta_end=1e-5)


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
