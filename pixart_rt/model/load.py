"""A component of a torch bundle: config.json and model.safetensors to a module, and back.

The module takes exactly the component's inputs by keyword (backends/base.py), float32 at the
border, weights in the precision they were written with.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_rt.config import ModelConfig
from pixart_rt.errors import BundleError, CheckpointError
from pixart_rt.model.tensors import TensorFolder
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, vae_from_config


class TextEncoderModule(nn.Module):
    """input_ids, attention_mask [B, T] to prompt_embeds [B, T, C] float32."""

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask)


class HiddenModule(nn.Module):
    """A later part of a split text encoder: hidden [B, T, C], attention_mask to the same shape."""

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(hidden, attention_mask)


class DenoiserModule(nn.Module):
    """The transformer core with float32 output; its modulator runs outside."""

    def __init__(self, core: PixArtTransformer) -> None:
        super().__init__()
        self.core = core
        del core.modulator

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
    ) -> Tensor:
        noise = self.core(tokens, pos_embed, modulation, prompt_embeds, prompt_mask)
        return noise.to(torch.promote_types(noise.dtype, torch.float32))


def save_module(folder: Path, module: nn.Module, config: object) -> None:
    """Write what `load_module` reads. `config` is a ModelConfig, T5Config or VAE config dict."""
    values = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_module(folder: Path, component: str) -> nn.Module:
    """The module of a torch bundle's component, in eval mode, on the CPU.

    Raises BundleError when the folder is incomplete or does not fit its config.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        with torch.device("meta"):
            module = build_module(component, config)
        state = dict(TensorFolder(folder))
        if component == "vae_decoder":  # diffusers keeps buffers that meta tensors cannot fill
            module = build_module(component, config)
        module.load_state_dict(state, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{folder} is damaged ({reason}); build the bundle again") from error
    return module.eval().requires_grad_(False)


def build_module(component: str, config: dict[str, object]) -> nn.Module:
    """A component's module with whatever weights the present device context gives it."""
    if component == "text_encoder":
        return TextEncoderModule(T5Encoder(T5Config(**config)))  # type: ignore[arg-type]
    if component == "transformer":
        return DenoiserModule(PixArtTransformer(ModelConfig.from_dict(config)))
    return VaeDecoder(vae_from_config(config))
