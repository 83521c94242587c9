"""The forward noising process and the loss of a model that predicts noise and variance.

    q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I)            a_t = prod_{s<=t} (1 - beta_s)
    loss         = mean (eps - eps_theta)^2 + L_vb           both as means over a sample's values

Noise prediction is DDPM (Ho et al., arXiv:2006.11239); the variance head and L_vb are "Improved
DDPM" (Nichol & Dhariwal, arXiv:2102.09672, eq. 15 and section 3.1). PixArt-alpha inherits them from
DiT. B samples, C channels: x is [B, C, h, w], model outputs are [B, 2C, h, w] (noise, then
variance), timesteps are [B] integers in 0..num_timesteps-1, losses are [B].
"""

import math

import numpy as np
import torch
from torch import Tensor

BIN = 1 / 255  # half width of a pixel value in -1..1; DiT keeps it for latents, and so do we


class GaussianDiffusion:
    """Linear betas over `num_timesteps` steps; tables in float64, results in float32."""

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
        kept = np.cumprod(1 - betas)  # a_t
        kept_before = np.append(1.0, kept[:-1])  # a_{t-1}
        variance = betas * (1 - kept_before) / (1 - kept)  # of q(x_{t-1} | x_t, x_0); 0 at t = 0
        variance[0] = variance[1]  # its logarithm is needed; the decoder's scale at t = 0
        self.num_timesteps = num_timesteps
        self.tables = {
            "signal": torch.from_numpy(np.sqrt(kept)),
            "noise": torch.from_numpy(np.sqrt(1 - kept)),
            "inverse_signal": torch.from_numpy(np.sqrt(1 / kept)),
            "inverse_noise": torch.from_numpy(np.sqrt(1 / kept - 1)),
            "posterior_start": torch.from_numpy(betas * np.sqrt(kept_before) / (1 - kept)),
            "posterior_current": torch.from_numpy(
                (1 - kept_before) * np.sqrt(1 - betas) / (1 - kept)
            ),
            "min_log_variance": torch.from_numpy(np.log(variance)),
            "max_log_variance": torch.from_numpy(np.log(betas)),
        }

    def at(self, table: str, t: Tensor) -> Tensor:
        """Entries of a table at timesteps t [B], as float32 [B, 1, 1, 1] on t's device."""
        return self.tables[table].to(t.device)[t].float()[:, None, None, None]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for the given noise (DDPM eq. 4)."""
        return self.at("signal", t) * x_start + self.at("noise", t) * noise

    def training_losses(
        self, model_output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """{"loss", "mse", "vb"}, each [B] float32; loss = mse + vb, without further weights.

        The bound sees a detached noise prediction: it trains the variance half alone.
        """
        x_start, noise = x_start.float(), noise.float()
        predicted, variance = model_output.float().chunk(2, dim=1)
        mse = (noise - predicted).square().mean(dim=(1, 2, 3))
        x_t = self.q_sample(x_start, t, noise)
        vb = self._variational_bound(predicted.detach(), variance, x_start, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, predicted: Tensor, variance: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Bits per value [B]: KL(q(x_{t-1}|x_t,x_0) || p_theta), at t = 0 -log p_theta(x_0|x_1)."""
        guess = self.at("inverse_signal", t) * x_t - self.at("inverse_noise", t) * predicted
        mean = self._posterior_mean(guess, x_t, t)
        low, high = self.at("min_log_variance", t), self.at("max_log_variance", t)
        share = (variance + 1) / 2  # the model speaks in -1..1 between the two bounds
        log_variance = share * high + (1 - share) * low
        divergence = gaussian_kl(self._posterior_mean(x_start, x_t, t), low, mean, log_variance)
        decoder = -binned_log_likelihood(x_start, mean, 0.5 * log_variance)
        bits = torch.where((t == 0)[:, None, None, None], decoder, divergence) / math.log(2)
        return bits.mean(dim=(1, 2, 3))

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self.at("posterior_start", t) * x_start + self.at("posterior_current", t) * x_t


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(mean2, e^log_variance2)) in nats, value by value."""
    gap = log_variance - log_variance2
    return 0.5 * (gap.exp() - 1 - gap + (mean - mean2).square() * torch.exp(-log_variance2))


def binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal's mass in x +- BIN in nats; the outermost bins run to infinity.

    A floor of 1e-12 keeps the logarithm finite where the mass underflows float32.
    """
    inverse = torch.exp(-log_scale)
    above = _normal_cdf((x - mean + BIN) * inverse)
    below = _normal_cdf((x - mean - BIN) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
