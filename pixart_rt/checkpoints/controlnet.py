"""ControlNet checkpoints: our folders, and the .pth layout of the released PixArt-delta ones.

    ours                          .pth
    copies.i.block.attn.qkv       controlnet.i.copied_block.attn.qkv     and the block's others
    copies.i.before_proj          controlnet.i.before_proj                (chained: of copy 0)
    copies.i.after_proj           controlnet.i.after_proj
    (the model's own)             base_model.*                           where the file has them

A folder holds config.json and model.safetensors, with the copies and not the model, which is frozen
and has a checkpoint of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.single_file import STATE_KEYS, read_file, state_dict, without_prefix
from pixart_rt.checkpoints.tensors import TensorFolder
from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import ModelConfig
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.files import CONTROLNET, check_file, read_json, replacing, replacing_folder
from pixart_rt.model.controlnet import COPIES, ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.embeddings import position_table

CLASS = "PixArtControlNet"  # of a folder's config.json
WEIGHTS = "model.safetensors"
SAME_BASE = 1e-2  # relative; rounding to bfloat16 alone gives up to 4e-3
_SHAPE = ("num_layers", "num_heads", "head_dim")  # of the model, on which the copies depend
_STORED = "pixart_rt_controlnet"  # our settings in a .pth, next to its state_dict
_BASE, _THEIRS, _BLOCK = "base_model.", "controlnet.", ".copied_block."
_ANCHOR = "controlnet.0.after_proj.weight"  # always there
_POSITIONS, _NULL = "pos_embed", "y_embedder.y_embedding"


@dataclass(frozen=True, slots=True)
class ControlNetCheckpoint:
    """The copies' weights, under the names of ControlNetTransformer, and the model they are for."""

    config: ControlNetConfig
    model: ModelConfig
    state: dict[str, Tensor]
    source: str
    base: dict[str, Tensor] | None = None  # the model's own weights, where the file has them


def read_controlnet(
    path: Path, model: ModelConfig, *, which: str | None = None
) -> ControlNetCheckpoint:
    """One of our folders or a .pth, in the file's dtype, for a model of this configuration.

    `which` chooses among a .pth's "state_dict", the default, and "state_dict_ema". Raises
    CheckpointError for a file that is damaged or of another model.
    """
    path = Path(path)
    if path.is_dir():
        if which is not None:
            raise ConfigError(f"{which} chooses inside a .pth, but {path} is a folder")
        return _read_folder(path, model)
    if path.is_file():
        return _read_pth(path, model, which)
    raise CheckpointError(f"{path} does not exist; give a ControlNet's folder or .pth")


def load_controlnet(
    checkpoint: ControlNetCheckpoint,
    model: TransformerCheckpoint,
    dtype: torch.dtype | None = None,
) -> ControlNetTransformer:
    """The module, in eval mode, sharing memory where no dtype changes.

    Raises CheckpointError where the ControlNet's file holds another model than `model`.
    """
    _check_base(checkpoint, model)
    with torch.device("meta"):
        made = ControlNetTransformer(model.config, checkpoint.config)
    state = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in {**model.state, **checkpoint.state}.items()
    }
    made.load_state_dict(state, assign=True)
    return made.eval()


def controlnet_of(module: ControlNetTransformer, source: str) -> ControlNetCheckpoint:
    """What is written of a module: its copies. Their memory is the module's."""
    state = {name: each for name, each in module.state_dict().items() if name.startswith(COPIES)}
    return ControlNetCheckpoint(module.controlnet, module.config, state, source)


def write_controlnet(checkpoint: ControlNetCheckpoint, folder: Path, *, force: bool = True) -> None:
    """Write a folder that `read_controlnet` reads: whole, or as it was before.

    With `force` it replaces another that we wrote; never anything else (files.py): ConfigError.
    """
    folder = Path(folder)
    values = {
        "_class_name": CLASS,
        **checkpoint.config.to_dict(),
        "model": {name: getattr(checkpoint.model, name) for name in _SHAPE},
    }
    with replacing_folder(folder, CONTROLNET, force=force) as temporary:
        (temporary / "config.json").write_text(
            json.dumps(values, indent=2) + "\n", encoding="utf-8"
        )
        state = {name: tensor.contiguous() for name, tensor in checkpoint.state.items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})


def write_controlnet_pth(
    checkpoint: ControlNetCheckpoint, model: TransformerCheckpoint, path: Path
) -> None:
    """Write a .pth in the released layout, with the model, which the original code needs in it.

    That code has no class for a parallel one; its file can be read here alone.
    """
    path = Path(path)
    check_file(path, force=True)
    base = tensor_names.from_ours(model.state, model.config, tensor_names.original_names)
    side = model.config.base_size
    base[_POSITIONS] = position_table(model.config, (side, side))
    if model.y_embedding is not None:
        base[_NULL] = model.y_embedding
    state = {_BASE + name: tensor for name, tensor in base.items()}
    state |= {_released_name(name): tensor for name, tensor in checkpoint.state.items()}
    with replacing(path) as temporary:
        torch.save({STATE_KEYS[0]: state, _STORED: checkpoint.config.to_dict()}, temporary)


def _read_folder(path: Path, model: ModelConfig) -> ControlNetCheckpoint:
    values = _read_config(path)
    if values.pop("_class_name", None) != CLASS:
        raise CheckpointError(f"{path} is no ControlNet folder: its config.json is of another kind")
    needed = values.pop("model", {})
    try:
        config = ControlNetConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path} has damaged settings: {error}") from error
    found = {name: getattr(model, name) for name in _SHAPE}
    if needed != found:
        raise CheckpointError(
            f"{path} was trained for a model with {needed}, this one has {found}; use the model it "
            "was trained for"
        )
    return _checked(dict(TensorFolder(path)), config, model, str(path), lambda name: (name,))


def _read_pth(path: Path, model: ModelConfig, which: str | None) -> ControlNetCheckpoint:
    loaded = read_file(path)
    tensors = state_dict(loaded, which, path, model="ControlNet")
    tensors = without_prefix(tensors, _ANCHOR, str(path))
    base = {
        name.removeprefix(_BASE): tensor
        for name, tensor in tensors.items()
        if name.startswith(_BASE)
    }
    copies = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BASE)}
    config = _config_of(copies, loaded.get(_STORED), str(path))
    checkpoint = _checked(copies, config, model, str(path), lambda name: (_released_name(name),))
    if not base:
        return checkpoint
    ours = tensor_names.to_ours(
        base,
        model,
        tensor_names.original_names,
        known=[_POSITIONS, _NULL],
        source=f"{path}, base_model",
    )
    return ControlNetCheckpoint(config, model, checkpoint.state, str(path), ours)


def _config_of(names: Mapping[str, Tensor], stored: Any, source: str) -> ControlNetConfig:
    """Copies are counted; one linear before the first tells a chained one from a parallel one."""
    if stored is not None:
        try:
            return ControlNetConfig.from_dict(dict(stored))
        except (ConfigError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} has damaged settings: {error}") from error
    found = {int(match[1]) for name in names if (match := re.match(r"controlnet\.(\d+)\.", name))}
    if not found:
        raise CheckpointError(
            f"{source} holds no ControlNet: no tensor's name begins with {_THEIRS}0; give a file "
            "such as PixArt-XL-2-1024-ControlNet.pth"
        )
    before = sum(
        bool(re.fullmatch(r"controlnet\.\d+\.before_proj\.weight", each)) for each in names
    )
    variant = ControlVariant.CHAINED if before <= 1 else ControlVariant.PARALLEL
    return ControlNetConfig(variant=variant, num_copies=1 + max(found))


def _checked(
    tensors: Mapping[str, Tensor],
    config: ControlNetConfig,
    model: ModelConfig,
    source: str,
    namer: tensor_names.Namer,
) -> ControlNetCheckpoint:
    """The tensors under our names, all there and of the right shapes."""
    try:
        with torch.device("meta"):
            copies = ControlNetTransformer(model, config).copies
    except ConfigError as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error
    shapes = {COPIES + name: each.shape for name, each in copies.named_parameters()}
    state = tensor_names.to_ours(tensors, model, namer, known=[], source=source, shapes=shapes)
    return ControlNetCheckpoint(config, model, state, source)


def _released_name(name: str) -> str:
    return name.replace(COPIES, _THEIRS, 1).replace(".block.", _BLOCK, 1)


def _check_base(checkpoint: ControlNetCheckpoint, model: TransformerCheckpoint) -> None:
    """CheckpointError unless the model is the one whose blocks were copied, as far as is known."""
    if any(getattr(checkpoint.model, name) != getattr(model.config, name) for name in _SHAPE):
        raise CheckpointError(f"{checkpoint.source} was not read for {model.source}")
    if checkpoint.base is None:
        return
    difference = size = 0.0
    for name, mine in checkpoint.base.items():
        wide = mine.float()
        difference += float((model.state[name].float() - wide).square().sum())
        size += float(wide.square().sum())
    if difference > SAME_BASE**2 * size:
        raise CheckpointError(
            f"{checkpoint.source} was trained on other weights than {model.source} (they differ by "
            f"{(difference / size) ** 0.5:.2g} of their norm); use the model it was trained on"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path / "config.json")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no ControlNet folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/config.json is damaged ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}/config.json is damaged: it holds no settings")
    return values
