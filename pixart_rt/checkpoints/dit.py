"""Checkpoints of facebookresearch/DiT: `.pt` files read and written, the configuration inferred.

    ours                DiT
    x_embedder          x_embedder.proj     a convolution, [D, C, p, p]
    (recomputed)        pos_embed           [1, N, D], sines and cosines of 0, 1, 2...
    all others          the same

A published file is a dict of tensors; one of DiT's train.py holds {model, ema, opt, args}, of which
its own loader takes the EMA. What no tensor tells is the number of heads.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.single_file import without_prefix
from pixart_rt.checkpoints.tensors import read_pickle
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.files import check_file, replacing
from pixart_rt.model.dit import DiT, DiTConfig
from pixart_rt.model.embeddings import position_table

logger = logging.getLogger(__name__)

DEFAULT_HEADS = 16  # DiT-XL and DiT-L; B has 12, S has 6
PUBLISHED_HEAD_DIMS = (72, 64)  # XL; L, B and S
WEIGHTS = ("ema", "model")  # what a file of train.py may hold; the first is the default
POSITIONS_TOLERANCE = 2e-2  # of values up to 1, which may have been rounded to bfloat16
_POSITIONS = "pos_embed"


@dataclass(frozen=True, slots=True)
class DiTCheckpoint:
    """A DiT's configuration and weights, under the names of our module."""

    config: DiTConfig
    state: dict[str, Tensor]
    source: str


def read_dit(path: Path, *, heads: int | None = None, which: str | None = None) -> DiTCheckpoint:
    """A DiT's `.pt`, in the file's dtype. The label table's last row is the null label.

    `which` chooses "ema", the default, or "model" in a file of train.py. Raises CheckpointError for
    a file that is damaged or of another model, ConfigError for flags that do not fit it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file; give a DiT's .pt")
    if which is not None and which not in WEIGHTS:
        raise ConfigError(f"--which {which} is not supported; choose from {', '.join(WEIGHTS)}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # train.py keeps its arguments
        loaded: dict[str, Any] = read_pickle(path)
    tensors = _weights(loaded, which, path)
    config = _config_of(tensors, heads, str(path))
    state = tensor_names.to_ours(
        tensors,
        config.backbone(),
        tensor_names.original_names,
        known=[_POSITIONS],
        source=str(path),
        shapes=_shapes(config),
    )
    _check_positions(tensors[_POSITIONS], config, str(path))
    return DiTCheckpoint(config, state, str(path))


def load_dit(checkpoint: DiTCheckpoint, dtype: torch.dtype | None = None) -> DiT:
    """The module, in eval mode. With its own dtype it shares the checkpoint's memory."""
    with torch.device("meta"):
        model = DiT(checkpoint.config)
    state = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in checkpoint.state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def write_dit(checkpoint: DiTCheckpoint, path: Path) -> None:
    """Write a `.pt` that facebookresearch/DiT loads with strict names: tensors and no settings."""
    path, backbone = Path(path), checkpoint.config.backbone()
    check_file(path, force=True)
    tensors = tensor_names.from_ours(checkpoint.state, backbone, tensor_names.original_names)
    tensors[_POSITIONS] = position_table(backbone, (backbone.base_size, backbone.base_size))
    with replacing(path) as temporary:
        torch.save(tensors, temporary)


def _weights(loaded: Mapping[str, Any], which: str | None, path: Path) -> dict[str, Tensor]:
    """The state dict in a loaded file, without the prefixes of wrappers."""
    present = [name for name in WEIGHTS if isinstance(loaded.get(name), dict)]
    if which is not None and which not in present:
        found = ", ".join(present) or "plain tensors"
        raise ConfigError(f"--which {which} was requested, but {path} has {found}")
    chosen = loaded[which or present[0]] if present else loaded
    strange = [name for name, value in chosen.items() if not isinstance(value, Tensor)]
    if strange or not chosen:
        found = str(strange[0]) if strange else "nothing"
        raise CheckpointError(f"{path} is no DiT's state dict: it holds {found}")
    named = {str(name): value for name, value in chosen.items()}
    return without_prefix(named, "x_embedder.proj.weight", str(path))


def _config_of(tensors: Mapping[str, Tensor], heads: int | None, source: str) -> DiTConfig:
    """The configuration, from the shapes of the tensors and the number of heads."""
    if "y_embedder.y_proj.fc1.weight" in tensors:
        raise CheckpointError(
            f"{source} is a text model already, not a class-conditional DiT; give DiT's .pt"
        )
    try:
        width, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        num_labels, _ = tensors["y_embedder.embedding_table.weight"].shape
        out_rows, _ = tensors["final_layer.linear.weight"].shape
        _, num_tokens, _ = tensors[_POSITIONS].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a DiT: {error} is missing or of another rank; give DiT's .pt"
        ) from error
    layers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    num_heads = _heads(width, heads, source)
    try:
        return DiTConfig(
            num_classes=num_labels - 1,
            num_layers=1 + max(layers, default=-1),
            num_heads=num_heads,
            head_dim=width // num_heads,
            in_channels=in_channels,
            out_channels=out_rows // patch_size**2,
            patch_size=patch_size,
            sample_size=math.isqrt(num_tokens) * patch_size,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} is not a DiT: {error}") from error


def _heads(width: int, asked: int | None, source: str) -> int:
    heads = DEFAULT_HEADS if asked is None else asked
    if heads < 1 or width % heads:
        raise ConfigError(f"{heads} heads do not divide the width {width} of {source}; set --heads")
    if asked is None and width // heads not in PUBLISHED_HEAD_DIMS:
        logger.warning(
            "%s: %d heads were assumed, %d channels each; DiT-B has 12 heads and DiT-S 6, "
            "so set --heads if this is another",
            source, heads, width // heads,
        )  # fmt: skip
    return heads


def _shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """The shape of every parameter, by our names, without making one."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in DiT(config).named_parameters()}


def _check_positions(table: Tensor, config: DiTConfig, source: str) -> None:
    """CheckpointError unless the table is the fixed one, which is what a text model computes."""
    backbone = config.backbone()
    expected = position_table(backbone, (backbone.base_size, backbone.base_size))
    near = table.shape == expected.shape and torch.allclose(
        table.float(), expected, atol=POSITIONS_TOLERANCE, rtol=0
    )
    if not near:
        raise CheckpointError(
            f"the pos_embed of {source}, {list(table.shape)}, is not DiT's table of sines and "
            f"cosines {list(expected.shape)}; use a checkpoint with fixed positions"
        )
