"""Transformer checkpoints: diffusers folders and original files, read, written, converted.

The original layout is one file, .pth or .safetensors (single_file.py). Both layouts hold the same
numbers (tensor_names.py), so every way there and back is exact. What diffusers has no place for is
kept next to the weights: the original code's null embedding, and how the weights were made where
that is known.

    transformer/config.json  diffusion_pytorch_model.safetensors
                y_embedding.safetensors  origin.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.configs import (
    DEFAULT_HEADS,
    DEFAULT_TEXT_TOKENS,
    SIGMA_TEXT_TOKENS,
    Flags,
    config_from_json,
    config_from_tensors,
    config_to_json,
)
from pixart_rt.checkpoints.single_file import (
    STATE_KEYS,
    read_file,
    state_dict,
    without_prefix,
    write_file,
)
from pixart_rt.checkpoints.tensors import TensorFolder, open_safetensors
from pixart_rt.config import CfgNull, ModelConfig
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.files import (
    TRANSFORMER,
    check_file,
    check_model,
    is_model_file,
    read_json,
    replacing,
    replacing_folder,
)
from pixart_rt.model.embeddings import position_table
from pixart_rt.model.transformer import PixArtTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
Y_EMBEDDING_FILE = "y_embedding.safetensors"
ORIGIN_FILE = "origin.json"
_STORED = "pixart_rt"  # our settings in a .pth, next to its state_dict
_ORIGIN = "pixart_rt_origin"
_PTH_ANCHOR, _DIFFUSERS_ANCHOR = "x_embedder.proj.weight", "pos_embed.proj.weight"  # always there
_PTH_NULL, _DIFFUSERS_NULL = "y_embedder.y_embedding", "caption_projection.y_embedding"
FAMILY_TEXT_TOKENS = {
    "PixArtAlphaPipeline": DEFAULT_TEXT_TOKENS,
    "PixArtSigmaPipeline": SIGMA_TEXT_TOKENS,
}


@dataclass(frozen=True, slots=True)
class TransformerCheckpoint:
    """A transformer's configuration and weights, under the names of PixArtTransformer."""

    config: ModelConfig
    state: dict[str, Tensor]
    y_embedding: Tensor | None  # [T, C], the original code's null prompt
    source: str
    origin: dict[str, Any] | None = None  # how the weights were made: plain values, for people


def read_transformer(
    path: Path,
    *,
    heads: int | None = None,
    sample_size: int | None = None,
    interpolation_scale: float | None = None,
    which: str | None = None,
    max_text_tokens: int | None = None,
    cfg_null: CfgNull | None = None,
) -> TransformerCheckpoint:
    """A diffusers transformer or pipeline folder, or a file of the original layout, in its dtype.

    What wrappers put before or into the names (module., _orig_mod., model., ...) is taken off.
    `which` chooses among a file's "state_dict", the default as in the original inference code, and
    "state_dict_ema". Raises CheckpointError for a file that is damaged or of another model,
    ConfigError for a flag that is missing or contradicts the file.
    """
    path = Path(path)
    flags = Flags(
        heads=heads,
        sample_size=sample_size,
        interpolation_scale=interpolation_scale,
        max_text_tokens=max_text_tokens,
        cfg_null=None if cfg_null is None else CfgNull(cfg_null),
    )
    if which is not None and which not in STATE_KEYS:
        raise ConfigError(f"--which {which} is not supported; choose from {', '.join(STATE_KEYS)}")
    if path.is_dir():
        if which is not None:
            raise ConfigError(f"--which {which} chooses inside a .pth, but {path} is a folder")
        checkpoint = _read_folder(path, flags)
    elif path.is_file():
        checkpoint = _read_file(path, flags, which)
    else:
        raise CheckpointError(f"{path} does not exist; give a file or a diffusers folder")
    _check_null(checkpoint)
    return checkpoint


def load_transformer(
    checkpoint: TransformerCheckpoint, dtype: torch.dtype | None = None
) -> PixArtTransformer:
    """The module, in eval mode. With its own dtype it shares the checkpoint's memory."""
    with torch.device("meta"):
        model = PixArtTransformer(checkpoint.config)
    state = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in checkpoint.state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def write_diffusers(
    checkpoint: TransformerCheckpoint, folder: Path, *, force: bool = True
) -> dict[str, Any]:
    """Write a transformer folder that diffusers loads; returns a summary.

    With `force` it replaces another that we wrote; never anything else (files.py): ConfigError.
    """
    folder = Path(folder)
    tensors = tensor_names.from_ours(
        checkpoint.state, checkpoint.config, tensor_names.diffusers_names
    )
    with replacing_folder(folder, TRANSFORMER, force=force) as temporary:
        text = json.dumps(config_to_json(checkpoint.config), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if checkpoint.y_embedding is not None:
            null = {"y_embedding": checkpoint.y_embedding.contiguous()}
            save_file(null, temporary / Y_EMBEDDING_FILE)
        if checkpoint.origin is not None:
            origin = json.dumps(checkpoint.origin, indent=2)
            (temporary / ORIGIN_FILE).write_text(origin + "\n", encoding="utf-8")
    kept = [] if checkpoint.y_embedding is None else [f"y_embedding, in {Y_EMBEDDING_FILE}"]
    if checkpoint.origin is not None:
        kept.append(f"how the weights were made, in {ORIGIN_FILE}")
    dropped = ["pos_embed, which diffusers recomputes"]
    return _summary(checkpoint, folder, len(tensors), kept, dropped)


def write_pth(
    checkpoint: TransformerCheckpoint, path: Path, *, force: bool = True
) -> dict[str, Any]:
    """Write a file of the original layout, its position table recomputed; returns a summary.

    A .safetensors by its suffix, else a .pth. Settings that the layout cannot hold stand next to
    its state_dict, or in the metadata, where the original code does not look. Without a y_embedding
    none is invented: the summary says so.
    """
    path, config = Path(path), checkpoint.config
    check_file(path, force=force)
    tensors = tensor_names.from_ours(checkpoint.state, config, tensor_names.original_names)
    tensors["pos_embed"] = position_table(config, (config.base_size, config.base_size))
    kept, dropped = ["pos_embed, recomputed"], []
    if checkpoint.y_embedding is None:
        dropped.append("y_embedding: the source has none; the original code needs one for guidance")
    else:
        tensors[_PTH_NULL] = checkpoint.y_embedding
        kept.append("y_embedding")
    saved = {
        STATE_KEYS[0]: tensors,
        _STORED: {**config.to_dict(), "cfg_null": str(config.cfg_null)},
    }
    if checkpoint.origin is not None:
        saved[_ORIGIN] = checkpoint.origin
        kept.append("how the weights were made, next to the state_dict")
    with replacing(path) as temporary:
        write_file(path.suffix, saved, temporary)
    return _summary(checkpoint, path, len(tensors), kept, dropped)


def convert(
    src: Path,
    dst: Path,
    *,
    heads: int | None = None,
    sample_size: int | None = None,
    interpolation_scale: float | None = None,
    which: str | None = None,
    max_text_tokens: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """A file to a diffusers transformer folder or to the other kind of file, or a folder to a file.

    Returns the summary of what was written. Refuses to overwrite without `force`.
    """
    src, dst = Path(src), Path(dst)
    to_file = is_model_file(dst)
    if (src.suffix == dst.suffix) if not src.is_dir() else not to_file:
        wanted = "a .pth file or a .safetensors" if src.is_dir() else "a folder"
        raise ConfigError(f"{src} converts to {wanted}, but {dst} was requested")
    check_model(dst, TRANSFORMER, force=force)
    checkpoint = read_transformer(
        src,
        heads=heads,
        sample_size=sample_size,
        interpolation_scale=interpolation_scale,
        which=which,
        max_text_tokens=max_text_tokens,
    )
    return (write_pth if to_file else write_diffusers)(checkpoint, dst, force=force)


def _read_folder(path: Path, flags: Flags) -> TransformerCheckpoint:
    is_pipeline = (path / "model_index.json").is_file()
    folder = path / "transformer" if is_pipeline else path
    values = _read_json(folder / "config.json")
    index = folder.parent / "model_index.json"
    family = _read_json(index).get("_class_name") if index.is_file() else None
    tensors = without_prefix(TensorFolder(folder), _DIFFUSERS_ANCHOR, str(folder))
    null = tensors.get(_DIFFUSERS_NULL)  # the first converters left it there
    if (folder / Y_EMBEDDING_FILE).is_file():
        with open_safetensors(folder / Y_EMBEDDING_FILE) as file:
            null = {name: file.get_tensor(name) for name in file.keys()}.get("y_embedding")  # noqa: SIM118
    tokens = FAMILY_TEXT_TOKENS.get(str(family)) if null is None else null.shape[0]
    config = config_from_json(values, flags, tokens, str(folder / "config.json"))
    state = tensor_names.to_ours(
        tensors, config, tensor_names.diffusers_names, known=[_DIFFUSERS_NULL], source=str(folder)
    )
    told = folder / ORIGIN_FILE
    origin = _read_json(told) if told.is_file() else None
    return TransformerCheckpoint(config, state, null, str(path), origin)


def _read_file(path: Path, flags: Flags, which: str | None) -> TransformerCheckpoint:
    loaded = read_file(path)
    tensors = state_dict(loaded, which, path, model="transformer")
    if any(name.endswith(_DIFFUSERS_ANCHOR) for name in tensors):
        raise CheckpointError(f"{path} is one file of a diffusers folder; give the folder")
    tensors = without_prefix(tensors, _PTH_ANCHOR, str(path))
    tensor_names.refuse_variants(tensors, str(path))
    stored = _stored_settings(loaded, path)
    config = config_from_tensors(tensors, stored, flags, str(path))
    state = tensor_names.to_ours(
        tensors,
        config,
        tensor_names.original_names,
        known=["pos_embed", _PTH_NULL],
        source=str(path),
    )
    origin = loaded.get(_ORIGIN)
    return TransformerCheckpoint(config, state, tensors.get(_PTH_NULL), str(path), origin)


def _stored_settings(loaded: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `write_pth` kept next to the weights; nothing in a file of the original code."""
    if _STORED not in loaded:
        return {}
    try:
        return ModelConfig.from_dict(loaded[_STORED]).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has damaged settings ({error}); convert it again") from error


def _check_null(checkpoint: TransformerCheckpoint) -> None:
    config, null = checkpoint.config, checkpoint.y_embedding
    if null is None:
        if config.cfg_null is CfgNull.Y_EMBEDDING:
            raise ConfigError(
                f"{checkpoint.source} has no y_embedding, which cfg_null {config.cfg_null} needs; "
                f"convert the original .pth, or use {CfgNull.EMPTY_PROMPT}"
            )
        return
    expected = (config.max_text_tokens, config.caption_channels)
    if tuple(null.shape) != expected or not bool(torch.isfinite(null).all()):
        raise CheckpointError(
            f"the y_embedding of {checkpoint.source} is {list(null.shape)} or not finite; "
            f"it should be {list(expected)}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; give a diffusers transformer or pipeline folder"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings; download it again")
    return values


def _summary(
    checkpoint: TransformerCheckpoint,
    target: Path,
    num_tensors: int,
    kept: list[str],
    dropped: list[str],
) -> dict[str, Any]:
    """What was written, for people and for machines."""
    if checkpoint.config.num_heads != DEFAULT_HEADS and target.suffix == ".pth":
        kept = [*kept, f"num_heads {checkpoint.config.num_heads}, next to the state_dict"]
    return {
        "source": checkpoint.source,
        "target": str(target),
        "config": {**checkpoint.config.to_dict(), "cfg_null": str(checkpoint.config.cfg_null)},
        "num_tensors": num_tensors,
        "kept": kept,
        "dropped": dropped,
    }
