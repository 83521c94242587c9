"""The forward noising process and the loss of a model that predicts noise and variance.

    q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I)            a_t = prod_{s<=t} (1 - beta_s)
    loss         = w_t mean (eps - eps_theta)^2 + L_vb       both as means over a sample's values

Noise prediction is DDPM (Ho et al., arXiv:2006.11239); the variance head and L_vb are "Improved
DDPM" (Nichol & Dhariwal, arXiv:2102.09672, eq. 15 and section 3.1), as DiT and PixArt-alpha train:
L_vb in bits, unweighted (their LossType.MSE), with a detached noise prediction. w_t is 1, or the
min-SNR weight of arXiv:2303.09556. Written in the original's order of operations: at small t the
means of the two Gaussians agree in most of their digits, so another order is another number.

B samples, C channels: x is [B, C, h, w], model outputs are [B, 2C, h, w] (noise, then variance),
timesteps are [B] integers in 0..num_timesteps-1, losses are [B].
"""

import math

import numpy as np
import torch
from torch import Tensor

from pixart_rt.errors import ConfigError

BIN = 1 / 255  # half width of a pixel value in -1..1; DiT keeps it for latents, and so do we
SMALLEST_MASS = 1e-12  # keeps the logarithm finite where a bin's mass underflows


class GaussianDiffusion:
    """Linear betas over `num_timesteps` steps; tables in float64, results in float32 or wider.

    `min_snr_gamma` weights the noise error by min(snr, gamma) / snr with snr = a_t / (1 - a_t);
    the paper takes 5. None, as PixArt-alpha trains, is the weight 1.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        min_snr_gamma: float | None = None,
    ) -> None:
        if num_timesteps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ConfigError(
                f"betas from {beta_start} to {beta_end} in {num_timesteps} steps were requested; "
                "they must rise within 0 and 1, in at least 2 steps"
            )
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ConfigError(f"min_snr_gamma must be > 0, got {min_snr_gamma}; the paper takes 5")
        betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
        kept = np.cumprod(1 - betas)  # a_t
        kept_before = np.append(1.0, kept[:-1])  # a_{t-1}
        variance = betas * (1 - kept_before) / (1 - kept)  # of q(x_{t-1} | x_t, x_0); 0 at t = 0
        variance[0] = variance[1]  # its logarithm is needed; the decoder's scale at t = 0
        snr = kept / (1 - kept)
        gamma = math.inf if min_snr_gamma is None else min_snr_gamma
        self.num_timesteps = num_timesteps
        self.min_snr_gamma = min_snr_gamma
        self.tables = {
            name: torch.from_numpy(table)
            for name, table in {
                "signal": np.sqrt(kept),
                "noise": np.sqrt(1 - kept),
                "inverse_signal": np.sqrt(1 / kept),
                "inverse_noise": np.sqrt(1 / kept - 1),
                "posterior_start": betas * np.sqrt(kept_before) / (1 - kept),
                "posterior_current": (1 - kept_before) * np.sqrt(1 - betas) / (1 - kept),
                "min_log_variance": np.log(variance),
                "max_log_variance": np.log(betas),
                "weight": np.minimum(snr, gamma) / snr,
            }.items()
        }
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def at(self, table: str, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Entries of a table at timesteps t [B], as [B, 1, 1, 1] on t's device.

        A table is copied to a device once, so that a training step waits for no copy.
        """
        key = table, t.device, dtype
        if key not in self._placed:
            self._placed[key] = self.tables[table].to(dtype).to(t.device)
        return self._placed[key][t][:, None, None, None]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for the given noise (DDPM eq. 4), in float32 or wider."""
        dtype = _wide(x_start)
        return self.at("signal", t, dtype) * x_start + self.at("noise", t, dtype) * noise

    def training_losses(
        self, model_output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """{"loss", "mse", "vb"}, each [B] in float32 or wider; loss = w_t mse + vb.

        The bound sees a detached noise prediction: it trains the variance half alone. Raises
        ConfigError where model_output [B, 2C, h, w] is of another shape.
        """
        B, C, *sides = x_start.shape
        if model_output.shape != (B, 2 * C, *sides) or noise.shape != x_start.shape:
            raise ConfigError(
                f"losses of x_start {list(x_start.shape)} were requested with noise "
                f"{list(noise.shape)} and a model output of {list(model_output.shape)}; it must be "
                f"{[B, 2 * C, *sides]}: noise and variance"
            )
        dtype = _wide(x_start)
        x_start, noise = x_start.to(dtype), noise.to(dtype)
        predicted, variance = model_output.to(dtype).chunk(2, dim=1)
        mse = (noise - predicted).square().mean(dim=(1, 2, 3))
        x_t = self.q_sample(x_start, t, noise)
        vb = self._variational_bound(predicted.detach(), variance, x_start, x_t, t)
        weighted = mse
        if self.min_snr_gamma is not None:
            weighted = self.at("weight", t, dtype).flatten() * mse
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, predicted: Tensor, variance: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Bits per value [B]: KL(q(x_{t-1}|x_t,x_0) || p_theta), at t = 0 -log p_theta(x_0|x_1)."""
        dtype = x_t.dtype
        inverse_signal = self.at("inverse_signal", t, dtype)
        guess = inverse_signal * x_t - self.at("inverse_noise", t, dtype) * predicted
        mean = self._posterior_mean(guess, x_t, t)
        low, high = (self.at(f"{end}_log_variance", t, dtype) for end in ("min", "max"))
        share = (variance + 1) / 2  # the model speaks in -1..1 between the two bounds
        log_variance = share * high + (1 - share) * low
        divergence = gaussian_kl(self._posterior_mean(x_start, x_t, t), low, mean, log_variance)
        decoder = -binned_log_likelihood(x_start, mean, 0.5 * log_variance)
        nats = torch.where((t == 0)[:, None, None, None], decoder, divergence)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        start = self.at("posterior_start", t, x_t.dtype)
        return start * x_start + self.at("posterior_current", t, x_t.dtype) * x_t


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(mean2, e^log_variance2)) in nats, value by value."""
    ratio = torch.exp(log_variance - log_variance2)
    apart = (mean - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (-1 + log_variance2 - log_variance + ratio + apart)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal's mass in x +- BIN in nats; the outermost bins run to infinity."""
    inverse = torch.exp(-log_scale)
    centered = x - mean
    above = normal_cdf(inverse * (centered + BIN))
    below = normal_cdf(inverse * (centered - BIN))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=SMALLEST_MASS).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The normal's distribution function by tanh, within 2e-4 of the exact one.

    The approximation of GELU (arXiv:1606.08415); Improved DDPM, DiT and PixArt-alpha train with it.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
