"""LoRA files: peft's, diffusers', kohya's and ComfyUI's names, to those of diffusers' modules.

    base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight     peft; also without its prefix
    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight          diffusers; also lora.down
    lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight  kohya, OneTrainer; with alpha
    diffusion_model.blocks.0.attn.qkv.lora_up.weight                   ComfyUI, the original's names

A is lora_A or lora_down, B is lora_B or lora_up. An adapter of a packed linear (qkv) is one of each
part: all have its A, each its rows of B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.tensors import open_safetensors, read_pickle
from pixart_rt.errors import CheckpointError
from pixart_rt.files import parse_json

PREFIX = "base_model.model."  # of every tensor in peft's file
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_METADATA = "lora_adapter_metadata"  # of a .safetensors: peft's settings, as diffusers keeps them
_HALF = re.compile(r"(.+?)(?:\.lora_([AB])(?:\.default)?|\.lora[._](down|up))\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_BEFORE = re.compile(  # what programs put before a module's name
    r"base_model\.model\.|(model\.)?diffusion_model\.|transformer\.|lora_(transformer|unet)_|lycoris_"
)
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te)")
_BLOCK = re.compile(r"(?:transformer_)?blocks[._](\d+)[._](.+)")


@dataclass(frozen=True, slots=True)
class Half:
    """The adapter of one module, as the file names it."""

    a: Tensor
    b: Tensor
    alpha: float | None

    def by_module(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each of diffusers' modules that `name` is; of none it stays as it is."""
        modules = module_names(name)
        return dict(
            zip(modules, [(self.a, rows) for rows in self.b.chunk(len(modules))], strict=True)
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a LoRA's file, and peft's settings where diffusers kept them with it."""
    if path.suffix != ".safetensors":
        return read_pickle(path), None
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = (file.metadata() or {}).get(_METADATA)
    if told is None:
        return tensors, None
    try:
        return tensors, {
            name.removeprefix("transformer."): value for name, value in parse_json(told).items()
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}); save it again") from error


def adapters(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Half]:
    """The adapters by their modules' names in the file. CheckpointError for anything else in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        name = str(name)
        if _TEXT_ENCODER.match(name):
            raise CheckpointError(
                f"{path} adapts the text encoder ({name}), which merging would leave out; save an "
                "adapter of the transformer alone"
            )
        half, alpha = _HALF.fullmatch(name), _ALPHA.fullmatch(name)
        if half is None and alpha is None:
            raise CheckpointError(f"{path} holds {name}, which is no part of a LoRA")
        sound = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 0
        if half is None:  # kohya's alpha is a scalar, of any type
            sound = isinstance(tensor, Tensor) and tensor.numel() == 1
        if not sound or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN, infinity or integers")
        kind = "alpha"
        if half is not None:
            kind = "A" if half[2] == "A" or half[3] == "down" else "B"
        module = str((half or alpha)[1])  # type: ignore[index]
        if kind in found.setdefault(module, {}):
            raise CheckpointError(f"{path} has two adapters of {module}")
        found[module][kind] = tensor
    if not found:
        raise CheckpointError(f"{path} holds no adapters; save the adapter again")
    return {module: _fitting(module, parts, path) for module, parts in found.items()}


def module_names(name: str) -> tuple[str, ...]:
    """A file's module as diffusers has it: several for a packed linear, itself if none is known."""
    if before := _BEFORE.match(name):
        name = name[before.end() :]
    if block := _BLOCK.fullmatch(name):
        tails = _TAILS.get(block[2].replace(".", "_"), ())
        return tuple(f"transformer_blocks.{block[1]}.{tail}" for tail in tails) or (name,)
    return _TOPS.get(name.replace(".", "_"), (name,))


def _fitting(module: str, parts: Mapping[str, Tensor], path: Path) -> Half:
    if not {"A", "B"} <= parts.keys():
        raise CheckpointError(f"{path} has one half of the adapter of {module}")
    a, b = parts["A"], parts["B"]
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path}: A {list(a.shape)} and B {list(b.shape)} of {module} do not fit"
        )
    if b.shape[0] % len(module_names(module)):
        raise CheckpointError(f"{path}: the {b.shape[0]} rows of B of {module} do not divide")
    return Half(a, b, float(parts["alpha"]) if "alpha" in parts else None)


def _flat(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """By names with underscores for dots, as kohya writes them; each of the values is one too."""
    flat = {name.replace(".", "_"): modules for name, modules in names.items()}
    return flat | {
        module.replace(".", "_"): (module,) for modules in names.values() for module in modules
    }


_TAILS = _flat(tensor_names.BLOCK_MODULES)
_TOPS = _flat(
    {
        tensor_names.original_names(f"{ours}.weight")[0].removesuffix(".weight"): (theirs,)
        for ours, theirs in tensor_names.MODULES.items()
    }
)
