"""A class-conditional DiT to the text model that starts as it (arXiv:2310.00426, Section 2.3).

The DiT has a linear in each block, S_i = W_i silu(c) + b_i with c = t_emb + label. The text model
has one for all, S_i = t_block(t_emb) + E_i. Re-parameterisation chooses, for one timestep t,

    E_i     = W_i silu(t_emb(t)) + b_i - t_block(silu(t_emb(t)))          each block's table [6, D]
    E_final = W_final silu(t_emb(t)) + b_final - t_emb(t)                 the last layer's [2, D]

so that every block and the last layer are modulated at t as in the DiT without class, whatever
`t_block` is. Without class means c = t_emb(t): the label's term is left out, also the null
label's, as the paper writes it. The last layer is in the paper's text model a table and the raw
t_emb; its table is chosen by the same rule, so that the whole output is the DiT's at t.

Cross-attention ends in a linear of zeros: text has no influence before it is trained. Positions
are computed, not stored; at another size they are interpolated into the DiT's range (DiffFit,
arXiv:2304.06648). What the DiT has not starts as in the original code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints.dit import DiTCheckpoint, read_dit
from pixart_rt.checkpoints.tensor_names import expected_shapes
from pixart_rt.checkpoints.transformer import TransformerCheckpoint, write_diffusers, write_pth
from pixart_rt.config import CfgNull
from pixart_rt.files import TRANSFORMER, check_model, is_model_file
from pixart_rt.model.embeddings import sinusoid
from pixart_rt.training.reparameterize_settings import TBlock, TextStart
from pixart_rt.training.weight_init import initial_value
from pixart_rt.version import __version__


def reparameterize(dit: DiTCheckpoint, start: TextStart) -> TransformerCheckpoint:
    """The text model, in float32; without micro-conditioning, which starts in a later phase.

    Raises ConfigError for a size that the model cannot have.
    """
    backbone, random = dit.config.backbone(), torch.Generator().manual_seed(start.seed)
    size = backbone.sample_size if start.sample_size is None else start.sample_size
    scale = start.interpolation_scale
    config = replace(
        backbone,
        sample_size=size,
        interpolation_scale=size / backbone.sample_size if scale is None else scale,
        caption_channels=start.caption_channels,
        max_text_tokens=start.max_text_tokens,
        cfg_null=start.cfg_null,
    )
    shapes = expected_shapes(config)
    new = {  # what a DiT has not: the captions' projection, and cross-attention that adds nothing
        name: initial_value(name, shape, random)
        for name, shape in shapes.items()
        if name.startswith("y_proj.") or ".cross_attn." in name
    }
    shared = _shared_linear(dit, start.t_block, random)
    new["modulator.t_block.1.weight"], new["modulator.t_block.1.bias"] = shared
    embedded = _embedding(dit.state, start.t)
    at_t = _linear(F.silu(embedded), *shared)
    for i in range(config.num_layers):
        own = _linear(F.silu(embedded), *_adaln(dit.state, f"blocks.{i}"))
        new[f"blocks.{i}.scale_shift_table"] = (own - at_t).unflatten(0, (6, -1))
    final = _linear(F.silu(embedded), *_adaln(dit.state, "final_layer")).unflatten(0, (2, -1))
    new["final_layer.scale_shift_table"] = final - embedded
    state = {
        name: (new[name] if name in new else dit.state[name.removeprefix("modulator.")]).float()
        for name in shapes
    }
    null = None
    if config.cfg_null is CfgNull.Y_EMBEDDING:  # as the original code draws it; never trained
        null = torch.randn(config.max_text_tokens, config.caption_channels, generator=random)
        null /= math.sqrt(config.caption_channels)
    origin = {
        "made_by": f"pixart_rt {__version__} reparameterize",
        "dit": Path(dit.source).name,
        "dit_sample_size": backbone.sample_size,
        "without_class": "c = t_emb, no label's embedding added",
        "t": start.t,
        "t_block": str(start.t_block),
        "seed": start.seed,
    }
    return TransformerCheckpoint(config, state, null, dit.source, origin)


def reparameterize_file(
    src: Path,
    dst: Path,
    start: TextStart,
    *,
    heads: int | None = None,
    which: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """A DiT's `.pt` to a diffusers transformer folder, or to an original `.pth` by DST's suffix.

    Returns the summary of what was written; its "origin" is kept next to the weights. Refuses to
    overwrite without `force`.
    """
    src, dst = Path(src), Path(dst)
    check_model(dst, TRANSFORMER, force=force)
    checkpoint = reparameterize(read_dit(src, heads=heads, which=which), start)
    checkpoint = replace(
        checkpoint, origin={**(checkpoint.origin or {}), "dit_sha256": sha256(src)}
    )
    summary = (write_pth if is_model_file(dst) else write_diffusers)(checkpoint, dst, force=force)
    return {**summary, "origin": checkpoint.origin}


def _embedding(state: dict[str, Tensor], t: float) -> Tensor:
    """t_emb(t) [D] in float64, of the float32 sinusoid that the models see."""
    hidden = sinusoid(torch.tensor([t]))[0].double()
    hidden = _linear(hidden, state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"])
    return _linear(F.silu(hidden), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.double(), bias.double())


def _adaln(state: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    linear = f"{module}.adaLN_modulation.1"
    return state[f"{linear}.weight"], state[f"{linear}.bias"]


def _shared_linear(
    dit: DiTCheckpoint, choice: TBlock, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weight and bias of t_block, rounded to float32 as they will be stored."""
    layers = range(dit.config.num_layers)
    weight, bias = (tensor.double() for tensor in _adaln(dit.state, "blocks.0"))
    if choice is TBlock.RANDOM:
        names = (
            ("modulator.t_block.1.weight", weight.shape),
            ("modulator.t_block.1.bias", bias.shape),
        )
        new_weight, new_bias = (initial_value(*each, random) for each in names)
        return new_weight, new_bias
    if choice is TBlock.MEAN:
        for i in layers[1:]:  # one block at a time: XL's linears are 0.9 GB together
            one = _adaln(dit.state, f"blocks.{i}")
            weight, bias = weight + one[0], bias + one[1]
        weight, bias = weight / len(layers), bias / len(layers)
    return weight.float(), bias.float()
