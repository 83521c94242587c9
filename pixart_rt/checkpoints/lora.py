"""LoRA adapters, read and merged into a checkpoint: W + scale · s · B A.

    adapter_config.json  adapter_model.safetensors      peft and ours (or adapter_model.bin)
    pytorch_lora_weights.safetensors                    diffusers
    any.safetensors                                     kohya, OneTrainer, ComfyUI

lora_files.py reads the names in them. s is alpha / r, or alpha / sqrt(r) with rank stabilisation
(arXiv:2312.03732). Adapters name diffusers' modules, so those trained on diffusers' transformer,
with an A of its own for query, key and value, merge as well as ours. Needs no peft.

r rank of a module's adapter. A [r, inputs] and B [outputs, r]; of a convolution A [r, C, p, p] and
B [outputs, r, 1, 1].
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.lora_files import (
    DIFFUSERS_WEIGHTS,
    PREFIX,
    Half,
    adapters,
    read_tensors,
)
from pixart_rt.checkpoints.transformer import ORIGIN_FILE, TransformerCheckpoint
from pixart_rt.config import ModelConfig, Scheduler
from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG = "base_config"  # in origin.json: ModelConfig of the model that it was trained on
BASE_SHA256 = "base_sha256"  # likewise: of its weights, as `sampled_sha256` gives it
SAMPLED = 1024  # values of each part of a tensor that is hashed
_OF_BASE = ("num_layers", "num_heads", "head_dim", "caption_channels", "sample_size",
            "interpolation_scale", "micro_conditioning")  # fmt: skip
_OLD_WEIGHTS = "adapter_model.bin"
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
    base_sha256: str | None = None  # of that model's weights

    def delta(self, module: str) -> Tensor:
        """What is added to the module's weight, in float32: [outputs, inputs]."""
        a, b = (each.float().flatten(1) for each in self.pairs[module])
        return self.scales[module] * (b @ a)


def read_adapter(path: Path) -> Adapter:
    """A LoRA: a folder that peft, diffusers or we wrote, or a file of any of lora_files.py's names.

    Without settings or alphas s is 1, as the programs take it that write such files; peft's file
    needs its settings. Raises CheckpointError if it is missing or damaged, or asks for more than
    LoRA (DoRA, trained biases, ...), which merging would leave out.
    """
    path = Path(path)
    config, weights = _find(path)
    tensors, told = read_tensors(weights)
    config = told if config is None else config
    if config is not None:
        _refuse_unknown(config, path)
    pairs, scales = {}, {}
    for name, half in adapters(tensors, weights).items():
        scale = _scale(config, name, half, weights)
        for module, pair in half.by_module(name).items():
            if module in pairs:
                raise CheckpointError(f"{weights} has two adapters of {module}")
            pairs[module], scales[module] = pair, scale
    return Adapter(pairs, scales, str(path), sha256(weights), *_origin(path))


def _find(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """(peft's settings, the file of weights); None for a file that has none of their own."""
    peft = (ADAPTER_WEIGHTS, _OLD_WEIGHTS)
    if path.is_file() and path.name not in peft:
        return None, path
    folder = path.parent if path.is_file() else path
    if not (folder / ADAPTER_CONFIG).is_file():
        names = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
        for name in DIFFUSERS_WEIGHTS:
            if name in names:
                return None, folder / name
        others = sorted(name for name in names if name.endswith(".safetensors"))
        if len(others) == 1 and others[0] not in peft:
            return None, folder / others[0]
    config = _read_config(folder)
    for name in peft:
        if (folder / name).is_file():
            return config, folder / name
    raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again")


def sampled_sha256(state: Mapping[str, Tensor]) -> str:
    """What tells a model's weights from others of the same shapes, at no cost: SHA-256 of every
    tensor's name and shape, and of 4 × 1024 of its values, rounded to float16.

    By our names, so a .pth and a diffusers folder of one model agree, as does a float16 copy; one
    in bfloat16 does not. Against mistakes only: a change of other values alone is not seen.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].detach().reshape(-1)
        digest.update(json.dumps([name, list(state[name].shape)]).encode())
        last = max(0, len(flat) - SAMPLED)
        for start in (0, last // 3, 2 * last // 3, last):
            digest.update(flat[start : start + SAMPLED].half().cpu().numpy().tobytes())
    return digest.hexdigest()


def merge(
    checkpoint: TransformerCheckpoint,
    adapter: Adapter,
    scale: float = 1.0,
    *,
    any_base: bool = False,
) -> TransformerCheckpoint:
    """The checkpoint with `scale` times the adapter in its weights, float32.

    All weights become float32: in half precision the small changes of a LoRA are rounded away.
    The origin says what was merged. any_base: also into other weights of the same shapes than those
    it was trained on, such as a fine-tuned model. Raises CheckpointError for an adapter of another
    model.
    """
    config = checkpoint.config
    _refuse_base(adapter, config, checkpoint.source)
    if not any_base:
        _refuse_weights(adapter, checkpoint)
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
            f"{path} is missing; give the folder of a LoRA adapter, as peft or diffusers "
            "writes it, or its file"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} is of an adapter of type {kind}; only LORA can be merged")
    return config


def _origin(folder: Path) -> tuple[Scheduler | None, Mapping[str, Any] | None, str | None]:
    """(scheduler, base_config, base_sha256) of our origin.json; peft's has no place for them."""
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None, None, None
    try:
        origin = read_json(path)
        scheduler, config = origin.get("scheduler"), origin.get(BASE_CONFIG)
        if config is not None:
            config = dict(config)
        return None if scheduler is None else Scheduler(scheduler), config, origin.get(BASE_SHA256)
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


def _refuse_weights(adapter: Adapter, checkpoint: TransformerCheckpoint) -> None:
    """CheckpointError for an adapter of other weights; a warning where it does not say of which."""
    if adapter.base_sha256 is None:
        logger.warning(
            "%s does not say which weights it was trained on; only its shapes were compared with "
            "%s", adapter.source, checkpoint.source,
        )  # fmt: skip
        return
    found = sampled_sha256(checkpoint.state)
    if adapter.base_sha256 != found:
        raise CheckpointError(
            f"{adapter.source} was trained on other weights (hash {adapter.base_sha256[:12]}) than "
            f"{checkpoint.source} has ({found[:12]}); merge it into the model that it was trained "
            "on, or set `any_base`"
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


def _scale(config: Mapping[str, Any] | None, name: str, half: Half, path: Path) -> float:
    """s of a module. Raises CheckpointError where the settings and the weights disagree."""
    found = half.a.shape[0]
    if config is None:
        if half.alpha is None and name.startswith(PREFIX):
            raise CheckpointError(
                f"{path} is peft's file without its {ADAPTER_CONFIG}, which says the alpha; give "
                "the folder that has both"
            )
        return 1.0 if half.alpha is None else half.alpha / found
    if half.alpha is not None:
        raise CheckpointError(
            f"{path} holds {name}.alpha and has settings of peft, which say another; it is no part "
            "of a LoRA of peft"
        )
    module = name.removeprefix(PREFIX).removeprefix("transformer.")
    try:
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        scale = float(alpha / root)
    except (
        KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error
    ) as error:  # fmt: skip
        raise CheckpointError(f"{ADAPTER_CONFIG} of {path} is damaged ({error!r})") from error
    if rank != found:
        raise CheckpointError(
            f"{path}: the adapter of {module} has rank {found}, its settings say {rank}"
        )
    if not math.isfinite(scale):
        raise CheckpointError(f"{ADAPTER_CONFIG} of {path} is damaged (alpha {alpha!r})")
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
