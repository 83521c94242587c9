"""Weights of a transformers T5EncoderModel folder, read into our encoder layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from pixart_rt.checkpoints.tensors import TensorFolder
from pixart_rt.errors import CheckpointError
from pixart_rt.model.text_encoder import T5Config, T5Encoder, keep_dtype


def read_text_encoder(
    folder: Path,
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
    *,
    tensors: TensorFolder | None = None,
) -> T5Encoder:
    """Read layers `start` to `stop` of a transformers T5EncoderModel folder, in `dtype`.

    Other layers are not read. In float16 the `wo` weights stay float32 (model/text_encoder.py says
    why); norms always do. `tensors` are the folder's, where it is open already. Raises
    CheckpointError for missing or truncated weights.
    """
    config = T5Config.read(folder)
    tensors = tensors or TensorFolder(folder)
    with torch.device("meta"):
        encoder = T5Encoder(config, start, stop)
    state = {}
    for name, parameter in encoder.named_parameters():
        tensor = tensors[_transformers_name(name, start, tensors)]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(tensor.shape)}, its config says "
                f"{tuple(parameter.shape)}"
            )
        state[name] = tensor.to(keep_dtype(name, dtype))
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


def _transformers_name(name: str, start: int, tensors: TensorFolder) -> str:
    """Our parameter name in transformers' words."""
    if name == "embed.weight":
        tied = "encoder.embed_tokens.weight"
        return "shared.weight" if "shared.weight" in tensors else tied
    if name == "relative.weight":
        return "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if name == "final_norm.weight":
        return "encoder.final_layer_norm.weight"
    _, index, module, _ = name.split(".")
    sublayer = {
        "attn_norm": "layer.0.layer_norm",
        "mlp_norm": "layer.1.layer_norm",
        **{part: f"layer.0.SelfAttention.{part}" for part in "qkvo"},
        **{part: f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")},
    }
    return f"encoder.block.{start + int(index)}.{sublayer[module]}.weight"
