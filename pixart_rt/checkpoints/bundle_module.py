"""A component of a torch bundle: config.json and model.safetensors to a module, and back.

The module takes exactly the component's inputs by keyword (model/signature.py), float32 at the
border, weights in the precision they were written with.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_rt.checkpoints.tensors import TensorFolder, first_line
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BundleError
from pixart_rt.files import read_json
from pixart_rt.kernels.cross_attention import Absorbed
from pixart_rt.kernels.launch import exporting
from pixart_rt.model.controlnet import ControlNetTransformer, text_blocks
from pixart_rt.model.controlnet_config import CONTROLNET as CONTROLNET
from pixart_rt.model.controlnet_config import VAE_ENCODER as VAE_ENCODER
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.transformer import BlockCache, CrossText, PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, VaeEncoder, vae_from_config


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
    """The denoiser: `PixArtTransformer.denoise` over tensors only, with float32 output.

    Its modulator and the weights of its text side run outside, once for each request and prompt.
    """

    def __init__(self, core: PixArtTransformer) -> None:
        super().__init__()
        self.core = core
        del core.modulator, core.y_proj
        for block in text_blocks(core):
            del block.cross_attn.kv_linear

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        null_rows: Tensor,
        text_rows: Tensor,
        constant: Tensor,
        prompt_mask: Tensor,
        outputs: Tensor,
        text_kv: Tensor | None = None,
        absorbed_keys: Tensor | None = None,
        absorbed_bias: Tensor | None = None,
        absorbed_values: Tensor | None = None,
        cache: BlockCache | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in model/signature.py. Either text_kv or the three absorbed tensors."""
        dtype = self.core.x_embedder.weight.dtype
        # An exported graph must not branch on a size that may be 0; PyTorch saves two copies.
        none = not exporting() and null_rows.shape[0] == 0
        text = []
        for index in range(len(text_blocks(self.core))):
            attended: Tensor | Absorbed
            if text_kv is not None:
                attended = text_kv[index].to(dtype)
            else:
                assert absorbed_keys is not None and absorbed_bias is not None
                assert absorbed_values is not None
                attended = Absorbed(
                    absorbed_keys[index].to(dtype),
                    absorbed_bias[index],
                    absorbed_values[index].to(dtype),
                )
            text.append(
                CrossText(attended, prompt_mask, None if none else constant[index].to(dtype))
            )
        rows = torch.cat([null_rows, text_rows])
        given = (tokens, pos_embed, modulation, rows, text, outputs, cache)
        if control is None:
            noise = self.core.denoise(*given)
        else:
            assert isinstance(self.core, ControlNetTransformer), "this model takes no control"
            noise = self.core.denoise(*given, control=control)
        return noise.to(torch.promote_types(noise.dtype, torch.float32))


def save_module(folder: Path, module: nn.Module, config: object) -> None:
    """Write what `load_module` reads. `config` is a ModelConfig, T5Config or VAE config dict."""
    values = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_module(folder: Path, component: str) -> nn.Module:
    """The module of a torch bundle's component, in eval mode, on the CPU.

    Raises BundleError when the folder is incomplete or does not fit its config.
    """
    try:
        config = read_json(Path(folder) / "config.json")
        with torch.device("meta"):
            module = build_module(component, config)
        state = dict(TensorFolder(folder))
        if component.startswith("vae"):  # diffusers keeps buffers that meta tensors cannot fill
            module = build_module(component, config)
        module.load_state_dict(state, assign=True)
    except Exception as error:  # diffusers' and PyTorch's own, of a damaged configuration
        reason = first_line(error)
        raise BundleError(f"{folder} is damaged ({reason}); build the bundle again") from error
    return module.eval().requires_grad_(False)


def build_module(component: str, config: dict[str, object]) -> nn.Module:
    """A component's module with whatever weights the present device context gives it."""
    if component == "text_encoder":
        return TextEncoderModule(T5Encoder(T5Config(**config)))  # type: ignore[arg-type]
    if component == "transformer":
        return DenoiserModule(_transformer(dict(config)))
    vae = vae_from_config(config)
    return VaeEncoder(vae) if component == VAE_ENCODER else VaeDecoder(vae)


def _transformer(config: dict[str, object]) -> PixArtTransformer:
    controlnet = config.pop(CONTROLNET, None)
    model = ModelConfig.from_dict(config)
    if controlnet is None:
        return PixArtTransformer(model)
    return ControlNetTransformer(model, ControlNetConfig.from_dict(dict(controlnet)))  # type: ignore[call-overload]
