"""The two halves of diffusers' AutoencoderKL, latents rescaled inside.

B images, C latent channels, h×w latent pixels. The scaling factor comes from the VAE's own config:
0.18215 for PixArt-alpha, 0.13025 for PixArt-Sigma. `use` chooses diffusers' modules or the fused
ones of vae_fused.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixart_rt.config import Kernels
from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json
from pixart_rt.kernels.catalog import VAE, self_test
from pixart_rt.model.component_configs import SD_VAE as SD_VAE
from pixart_rt.model.vae_fused import Swap, fused_modules, swap
from pixart_rt.torchao_import import quiet_imports

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215}  # diffusers', of what we read


class VaeDecoder(nn.Module):
    """Latents [B, C, h, w] as the sampler leaves them to images [B, 3, 8h, 8w] in about [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.layout = torch.contiguous_format
        self._unfused: list[Swap] = []  # the modules that the fused ones stand for

    def use(self, kernels: Kernels) -> VaeDecoder:
        """Run channels-last, with diffusers' modules or the fused ones; returns self.

        Channels-last also pays on a CPU: 0.67 to 0.85 of the time of contiguous tensors, medians
        of pairs, tiny and SD VAE, 128 to 1024 px (float32, two shared cores, torch 2.13).
        """
        swap(self._unfused)
        self._unfused = []
        self.layout = torch.channels_last
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if kernels is Kernels.FUSED:
            weight = self.decoder.conv_in.weight
            if weight.is_cuda:
                self_test(weight.device, weight.dtype, VAE)
            self._unfused = swap(list(fused_modules(self.decoder)))
        return self

    def forward(self, latents: Tensor) -> Tensor:
        dtype = self.decoder.conv_in.weight.dtype
        latents = (latents / self.scaling_factor).to(dtype, memory_format=self.layout)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).to(torch.promote_types(dtype, torch.float32))


class VaeEncoder(nn.Module):
    """Images [B, 3, 8h, 8w] in [-1, 1] to the scaled means of their latents [B, C, h, w]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.quant_conv = vae.quant_conv
        self.encoder = vae.encoder

    def forward(self, images: Tensor) -> Tensor:
        moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0].float() * self.scaling_factor


def _autoencoder() -> type[AutoencoderKL]:
    """diffusers' class: seconds to import, so only for those who build a VAE."""
    with quiet_imports():
        from diffusers import AutoencoderKL
    return AutoencoderKL


def read_vae_config(folder: Path) -> dict[str, Any]:
    """config.json of a diffusers AutoencoderKL folder, without diffusers, which takes seconds.

    What it leaves out and we need has diffusers' default. Raises CheckpointError for what is no
    VAE of PixArt's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not a VAE folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"the VAE's {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"the VAE's {path} holds no settings by name; it is not a VAE folder")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if found.get(name) is not None:
            raise CheckpointError(
                f"the VAE in {folder} has {name} {found[name]}, which PixArt's latents do not; its "
                "images would be wrong. Give the VAE that the transformer was trained with"
            )
    config = DEFAULTS | found
    for name, kind in (("latent_channels", int), ("scaling_factor", (int, float))):
        value = config[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(
                f"the VAE in {folder} has {name} {value!r}; it must be a number above 0"
            )
    return config


def read_vae(folder: Path) -> AutoencoderKL:
    """A diffusers AutoencoderKL folder in float32. Raises CheckpointError if it is not one."""
    read_vae_config(folder)
    try:
        _check_sizes(read_json(Path(folder) / "config.json"))
        vae = _autoencoder().from_pretrained(folder, torch_dtype=torch.float32)
    except Exception as error:  # a damaged configuration fails anywhere in diffusers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the VAE in {folder} cannot be read: {reason}") from error
    return vae.eval().requires_grad_(False)


def _check_sizes(config: Any) -> None:
    """ValueError for a configuration of which diffusers would build layers without end."""
    if not isinstance(config, dict):
        raise ValueError(f"its config.json holds {type(config).__name__}")
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        most = 64 if name == "layers_per_block" else 2**14
        large = [each for each in numbers if type(each) in (int, float) and not abs(each) <= most]
        if large or len(numbers) > 64:
            raise ValueError(f"{name} is {str(value)[:40]}")
    factor = config.get("scaling_factor", 1)
    if type(factor) not in (int, float) or factor <= 0:
        raise ValueError(f"scaling_factor is {factor!r}")


def vae_from_config(config: dict[str, Any]) -> AutoencoderKL:
    """An AutoencoderKL of this configuration with fresh weights. Raises ValueError."""
    _check_sizes(config)
    return _autoencoder().from_config(config).eval().requires_grad_(False)
