"""One-file checkpoints: the state dict inside, under the names that its model has.

    {"state_dict": ...}, {"model": ...}        what trainers save; other entries are not read
    module.  _orig_mod.  model.  net.          before every name: wrappers, a trainer
    blocks.0._orig_mod.attn                    a wrapper around a block
    model.diffusion_model.  beside  vae.       ComfyUI's whole checkpoints

A .safetensors file holds the state dict alone, and our entries as JSON in its metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.checkpoints.tensors import open_safetensors, read_pickle
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.files import parse_json

_log = logging.getLogger(__name__)

_OURS = "pixart_rt"  # how the keys of our own entries begin
STATE_KEYS = ("state_dict", "state_dict_ema")  # the first is what the original code samples with
_NESTED = ("model", "module", "model_state_dict", "ema", "ema_state_dict", "params", "params_ema")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OTHER_PARTS = (  # of a whole checkpoint, next to the transformer
    "vae.", "first_stage_model.", "text_encoder.", "text_encoders.", "cond_stage_model.",
    "conditioner.",
)  # fmt: skip


def read_file(path: Path) -> dict[str, Any]:
    """What is in a .safetensors or a pickled file. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        return read_pickle(path)
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    try:
        told = {key: parse_json(text) for key, text in metadata.items() if key.startswith(_OURS)}
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}); convert it again") from error
    return {STATE_KEYS[0]: tensors, **told} if told else tensors


def write_file(suffix: str, saved: Mapping[str, Any], path: Path) -> None:
    """Write a state dict, under the first of STATE_KEYS, and our entries next to it."""
    if suffix != ".safetensors":
        torch.save(dict(saved), path)
        return
    tensors = {name: tensor.contiguous() for name, tensor in saved[STATE_KEYS[0]].items()}
    told = {key: json.dumps(value) for key, value in saved.items() if key.startswith(_OURS)}
    save_file(tensors, path, metadata={"format": "pt", **told})
    path.chmod(0o644)  # safetensors writes private files


def state_dict(
    loaded: Mapping[str, Any], which: str | None, path: Path, *, model: str
) -> dict[str, Tensor]:
    """The state dict in a loaded file: `which`, the first of STATE_KEYS, a trainer's, or the file.

    Raises ConfigError where `which` is not there, CheckpointError where it holds more than tensors
    or there are several. `model` is the message's word for what was looked for.
    """
    present = [name for name in STATE_KEYS if isinstance(loaded.get(name), dict)]
    if which is not None and which not in present:
        raise ConfigError(
            f"--which {which} was requested, but {path} has {', '.join(present) or 'plain tensors'}"
        )
    nested = [name for name in _NESTED if isinstance(loaded.get(name), dict)]
    if present:
        tensors = loaded[which or present[0]]
    elif len(nested) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts, {' and '.join(nested)}; save the one that is meant "
            f"alone, under the key {STATE_KEYS[0]}"
        )
    else:
        tensors = loaded[nested[0]] if nested else loaded
    strange = [
        str(name)
        for name, value in tensors.items()
        if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if strange or not tensors:
        found = strange[0] if strange else "nothing"
        raise CheckpointError(f"{path} is no {model}'s state dict: it holds {found}")
    return dict(tensors)


def without_prefix(tensors: Mapping[str, Tensor], anchor: str, source: str) -> dict[str, Tensor]:
    """The tensors under the names that follow what stands before `anchor`, a tensor of the model.

    Names without that prefix stay, for the reader to refuse; only the other parts of a whole
    checkpoint are left out. Raises CheckpointError where `anchor` is there under two prefixes.
    """
    plain = {name: _without_wrappers(name) for name in tensors}
    found = sorted(
        name.removesuffix(anchor)
        for name in plain.values()
        if name == anchor or name.endswith(f".{anchor}")
    )
    if len(set(found)) > 1:
        raise CheckpointError(
            f"{source} holds several models: {anchor} is there after {found[0]!r} and "
            f"{found[1]!r}; save the one that is meant alone"
        )
    prefix = found[0] if found else ""
    others = [name for name in plain if prefix and name.startswith(_OTHER_PARTS)]
    if others:
        _log.info("%s: %d tensors of other parts are left out", source, len(others))
    names = {name: plain[name].removeprefix(prefix) for name in tensors if name not in others}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{source} holds tensors twice, with and without {prefix!r}")
    return {names[name]: tensors[name] for name in names}


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
