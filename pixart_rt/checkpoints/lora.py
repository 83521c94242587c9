"""LoRA adapters in peft's format, read and merged into a checkpoint: W + scale · s · B A.

    adapter_config.json  adapter_model.safetensors      (or adapter_model.bin)

s is alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv:2312.03732). Adapters name
diffusers' modules, so those trained on diffusers' transformer, with an A of its own for query, key
and value, merge as well as ours. Needs no peft.

r rank of a module's adapter. A [r, inputs] and B [outputs, r]; of a convolution A [r, C, p, p] and
B [outputs, r, 1, 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.tensors import open_safetensors, read_pickle
from pixart_rt.checkpoints.transformer import ORIGIN_FILE, TransformerCheckpoint
from pixart_rt.config import ModelConfig, Scheduler
from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG = "base_config"  # in origin.json: ModelConfig of the model that it was trained on
_OF_BASE = ("num_layers", "num_heads", "head_dim", "caption_channels", "sample_size",
            "interpolation_scale", "micro_conditioning")  # fmt: skip
_OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor in the file
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")  # those that leave W as it was
_KNOWN = {  # settings that are read here, or do not change what a trained adapter computes
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """The A and B of every adapted module by diffusers' name, and the factor s of each."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    source: str
    sha256: str  # of the file of weights
    scheduler: Scheduler | None = None  # what samples the merged model; None: what samples the base
    base_config: Mapping[str, Any] | None = None  # of the model it was trained on, if it says so

    def delta(self, module: str) -> Tensor:
        """What is added to the module's weight, in float32: [outputs, inputs]."""
        a, b = (each.float().flatten(1) for each in self.pairs[module])
        return self.scales[module] * (b @ a)


def read_adapter(folder: Path) -> Adapter:
    """A LoRA folder that peft wrote, or we did.

    Raises CheckpointError if it is missing or damaged, or if its settings ask for more than LoRA
    (DoRA, trained biases, ...), which merging would leave out.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_unknown(config, folder)
    path, tensors = _read_tensors(folder)
    pairs = _paired(tensors, path)
    scales = {module: _scale(config, module, a, path) for module, (a, _) in pairs.items()}
    scheduler, base_config = _origin(folder)
    return Adapter(pairs, scales, str(folder), sha256(path), scheduler, base_config)


def merge(
    checkpoint: TransformerCheckpoint, adapter: Adapter, scale: float = 1.0
) -> TransformerCheckpoint:
    """The checkpoint with `scale` times the adapter in its weights, float32.

    All weights become float32: in half precision the small changes of a LoRA are rounded away.
    The origin says what was merged. Raises CheckpointError for an adapter of another model.
    """
    config = checkpoint.config
    _refuse_base(adapter, config, checkpoint.source)
    tensors = tensor_names.from_ours(checkpoint.state, config, tensor_names.diffusers_names)
    weights = {name.removesuffix(".weight"): name for name in tensors if name.endswith(".weight")}
    unknown = sorted(module for module in adapter.pairs if module not in weights)
    if unknown:
        raise CheckpointError(
            f"{adapter.source} adapts {unknown[0]}{_others(unknown)}, which {checkpoint.source} "
            "does not have; is it an adapter of another model?"
        )
    _refuse_shapes(tensors, weights, adapter, checkpoint.source)
    merged = {name: tensor.float() for name, tensor in tensors.items()}
    for module in adapter.pairs:
        name = weights[module]
        merged[name] = merged[name] + scale * adapter.delta(module).view_as(merged[name])
    source = f"{checkpoint.source} with {adapter.source}"
    state = tensor_names.to_ours(
        merged, config, tensor_names.diffusers_names, known=[], source=source
    )
    origin: dict[str, Any] = {
        "made_by": "pixart-rt merge",
        "base": checkpoint.source,
        "adapter": adapter.source,
        "adapter_sha256": adapter.sha256,
        "scale": scale,
    }
    if adapter.scheduler is not None:
        origin["scheduler"] = str(adapter.scheduler)
    if checkpoint.origin is not None:
        origin["base_origin"] = checkpoint.origin
    return replace(checkpoint, state=state, source=source, origin=origin)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is missing; give the folder of a LoRA adapter, as peft writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} is of an adapter of type {kind}; only LORA can be merged")
    return config


def _origin(folder: Path) -> tuple[Scheduler | None, Mapping[str, Any] | None]:
    """(scheduler, base_config) of our own origin.json; peft's file has no place for them."""
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None, None
    try:
        origin = read_json(path)
        scheduler, config = origin.get("scheduler"), origin.get(BASE_CONFIG)
        if config is not None:
            config = dict(config)
        return None if scheduler is None else Scheduler(scheduler), config
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the adapter again") from error


def _refuse_base(adapter: Adapter, config: ModelConfig, source: str) -> None:
    """CheckpointError for an adapter that was trained on a model of another size or positions."""
    for name in _OF_BASE:
        trained, found = (adapter.base_config or {}).get(name), getattr(config, name)
        if trained is not None and trained != found:
            raise CheckpointError(
                f"{adapter.source} was trained on a model with {name} {trained}, {source} has "
                f"{found}; merge it into the model that it was trained on"
            )


def _refuse_unknown(config: Mapping[str, Any], folder: Path) -> None:
    """CheckpointError for what would have to be merged besides B A."""
    asked = sorted(name for name, value in config.items() if value and name not in _KNOWN)
    if config.get("bias", "none") != "none":
        asked.append(f"bias = {config['bias']!r}")
    if config.get("init_lora_weights") not in _INITIAL:
        asked.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if asked:
        raise CheckpointError(
            f"{folder} uses {', '.join(asked)}, which cannot be merged here; merge it with peft, "
            "or convert it to a plain LoRA"
        )


def _read_tensors(folder: Path) -> tuple[Path, Mapping[str, Tensor]]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        with open_safetensors(path) as file:
            return path, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path = folder / _OLD_WEIGHTS
    if path.is_file():
        return path, read_pickle(path)
    raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again")


def _paired(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to (A, B). Raises CheckpointError for anything else in the file."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise CheckpointError(f"{path} holds {name}, which is no part of a LoRA")
        sound = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not sound or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN, infinity or integers")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise CheckpointError(f"{path} holds no adapters; save the adapter again")
    pairs = {}
    for module, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{path} has one half of the adapter of {module}")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"{path}: A {list(pair['A'].shape)} and B {list(pair['B'].shape)} of {module} do "
                "not fit"
            )
        pairs[module] = (pair["A"], pair["B"])
    return pairs


def _scale(config: Mapping[str, Any], module: str, a: Tensor, path: Path) -> float:
    """s of a module. Raises CheckpointError where the settings and the weights disagree."""
    try:
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        scale = float(alpha / root)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise CheckpointError(f"{path.parent / ADAPTER_CONFIG} is damaged ({error!r})") from error
    if rank != a.shape[0]:
        raise CheckpointError(
            f"{path}: the adapter of {module} has rank {a.shape[0]}, its settings say {rank}"
        )
    return scale


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that is the end of the module's name decides, as in peft."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_shapes(
    tensors: Mapping[str, Tensor], weights: Mapping[str, str], adapter: Adapter, source: str
) -> None:
    wrong = []
    for module, (a, b) in adapter.pairs.items():
        found, expected = [b.shape[0], *a.shape[1:]], list(tensors[weights[module]].shape)
        if found != expected or any(side != 1 for side in b.shape[2:]):
            wrong.append(f"{module} {found}, there {expected}")
    if wrong:
        raise CheckpointError(
            f"{adapter.source} does not fit {source}: {wrong[0]}{_others(wrong)}; is it an adapter "
            "of another model?"
        )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
