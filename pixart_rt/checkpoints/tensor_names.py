"""The names of a transformer's tensors: ours, the original code's, and diffusers'.

    ours                          original .pth             diffusers
    x_embedder                    x_embedder.proj           pos_embed.proj             a convolution
    y_proj.fc1                    y_embedder.y_proj.fc1     caption_projection.linear_1
    modulator.t_block.1           t_block.1                 adaln_single.linear
    blocks.i.attn.qkv             the same                  ...attn1.to_q, to_k, to_v  stacked
    blocks.i.cross_attn.kv_linear the same                  ...attn2.to_k, to_v        stacked

Our x_embedder.weight is the convolution's [D, C, p, p] flattened to [D, C·p·p]; the other tensors
are the same numbers, so a checkpoint goes from one family to another and back bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pixart_rt.config import ModelConfig
from pixart_rt.errors import CheckpointError

Namer = Callable[[str], tuple[str, ...]]  # our name to the file's, in the order they are stacked

_SCALAR_EMBEDDERS = {
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
MODULES = {
    "x_embedder": "pos_embed.proj",
    "y_proj.fc1": "caption_projection.linear_1",
    "y_proj.fc2": "caption_projection.linear_2",
    "modulator.t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    **{
        f"modulator.{ours}.mlp.{index}": f"adaln_single.emb.{theirs}.linear_{number}"
        for ours, theirs in _SCALAR_EMBEDDERS.items()
        for index, number in ((0, 1), (2, 2))
    },
}
BLOCK_MODULES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_REFUSED = {  # parts of variants that this transformer does not have
    r"\.attn\.(sr|norm)\.": "KV compression",
    r"\.(attn|cross_attn)\.[qk]_norm\.|\.attn[12]\.norm_[qk]\.": "QK normalization",
    r"\.attn\.rel_pos": "relative positions",
    r"\.base_layer\.|\.lora_[AB]\.": "a LoRA that is not merged",
}


def original_names(name: str) -> tuple[str, ...]:
    """Our parameter name in the words of the original code; always one."""
    if name.startswith("x_embedder."):
        return (name.replace("x_embedder.", "x_embedder.proj."),)
    if name.startswith("y_proj."):
        return (f"y_embedder.{name}",)
    return (name.removeprefix("modulator."),)


def diffusers_names(name: str) -> tuple[str, ...]:
    """Our parameter name in diffusers' words; several where diffusers splits a packed linear."""
    module, _, kind = name.rpartition(".")
    if module == "final_layer":
        return (kind,)
    if kind == "scale_shift_table":
        return (f"transformer_{name}",)
    if found := _BLOCK.fullmatch(name):
        index, part, kind = found.groups()
        return tuple(f"transformer_blocks.{index}.{it}.{kind}" for it in BLOCK_MODULES[part])
    return (f"{MODULES[module]}.{kind}",)


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter of a transformer, by our name, without making one."""
    from pixart_rt.model.transformer import PixArtTransformer

    with torch.device("meta"):
        model = PixArtTransformer(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def to_ours(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    namer: Namer,
    *,
    known: Iterable[str],
    source: str,
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, Tensor]:
    """A file's tensors under our names. `known` are file names that may be there besides.

    `shapes` are those of another model than the text transformer (model/dit.py), by our names.

    Raises CheckpointError for a tensor that is missing, unknown, of another shape or not finite:
    one line with the first of its kind and their number.
    """
    shapes = expected_shapes(config) if shapes is None else shapes
    names = {ours: namer(ours) for ours in shapes}
    used = {name for group in names.values() for name in group}
    refuse_variants(tensors, source)
    _report("lacks", [name for name in used if name not in tensors], source)
    _report("has the unknown", [name for name in tensors if name not in used | {*known}], source)
    state, misshapen, broken = {}, [], []
    for ours, shape in shapes.items():
        parts = [_readable(tensors[name]) for name in names[ours]]
        expected = _part_shape(ours, shape, len(parts), config)
        for name, part in zip(names[ours], parts, strict=True):
            if tuple(part.shape) != expected:
                misshapen.append(f"{name} {list(part.shape)} (expected {list(expected)})")
            elif not part.is_floating_point() or not bool(torch.isfinite(part).all()):
                broken.append(name)
        if not misshapen:
            state[ours] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
    _report("has a wrong shape:", misshapen, source)
    _report("holds NaN, infinity or integers:", broken, source)
    return state


def _readable(tensor: Tensor) -> Tensor:
    """bfloat16, which holds every value, in place of float8, in which PyTorch computes nothing."""
    float8 = tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return tensor.bfloat16() if float8 else tensor


def from_ours(state: Mapping[str, Tensor], config: ModelConfig, namer: Namer) -> dict[str, Tensor]:
    """Our tensors under a file's names; the exact inverse of `to_ours`."""
    tensors = {}
    for ours, tensor in state.items():
        names = namer(ours)
        if ours == "x_embedder.weight":
            p = config.patch_size
            tensor = tensor.reshape(-1, config.in_channels, p, p)
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            tensors[name] = part.contiguous()
    return tensors


def refuse_variants(names: Iterable[str], source: str) -> None:
    """CheckpointError if the names show a variant that this transformer cannot run."""
    for name in names:
        for pattern, what in _REFUSED.items():
            if re.search(pattern, name):
                raise CheckpointError(
                    f"{source} uses {what} ({name}), which is not supported; "
                    "use a checkpoint without it"
                )


def _part_shape(
    ours: str, shape: torch.Size, num_parts: int, config: ModelConfig
) -> tuple[int, ...]:
    """The shape that each of a parameter's file tensors must have."""
    if ours == "x_embedder.weight":
        return (shape[0], config.in_channels, config.patch_size, config.patch_size)
    return (shape[0] // num_parts, *shape[1:])


def _report(problem: str, names: list[str], source: str) -> None:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"{source} {problem} {min(names)}{others}; is it a whole transformer "
            "of this configuration?"
        )
