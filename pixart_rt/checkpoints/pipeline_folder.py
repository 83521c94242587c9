"""A transformer written where its user wants it: a .pth, a transformer folder, a whole pipeline.

A pipeline folder is a copy of another one with this transformer in it, so `pixart-rt build --model`
and diffusers take it as they took that one. Other components are copied, not linked: tools that
save into a folder would write through links.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_rt.checkpoints.transformer import TransformerCheckpoint, write_diffusers, write_pth
from pixart_rt.errors import CheckpointError
from pixart_rt.files import PIPELINE, is_model_file, read_json, replacing_folder

INDEX = "model_index.json"
TRANSFORMER = "transformer"
COMPONENTS = (TRANSFORMER, "vae", "text_encoder", "tokenizer", "scheduler")  # of a PixArt pipeline


def is_pipeline(path: Path) -> bool:
    return (path / INDEX).is_file()


def write_model(
    checkpoint: TransformerCheckpoint,
    out: Path,
    *,
    pipeline: Path | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
    force: bool = True,
) -> dict[str, Any]:
    """Write one file if `out` is named as one (.pth, .safetensors); else with `pipeline` a copy of
    that folder with this transformer; else a transformer folder. Returns the summary. `finish` is
    called with the pipeline folder before it takes its place, for what else differs in it.

    Whole or absent. With `force` it replaces one of its own kind that we wrote; never anything else
    (files.py): ConfigError.
    """
    out = Path(out)
    if is_model_file(out):
        return write_pth(checkpoint, out, force=force)
    if pipeline is None:
        return write_diffusers(checkpoint, out, force=force)
    with replacing_folder(out, PIPELINE, force=force) as temporary:
        for name in _components(pipeline):
            shutil.copytree(pipeline / name, temporary / name)
        shutil.copyfile(pipeline / INDEX, temporary / INDEX)
        summary = write_diffusers(checkpoint, temporary / TRANSFORMER)
        finish(temporary)
    return summary | {"target": str(out)}


def _components(pipeline: Path) -> list[str]:
    """The folders that a pipeline's index names, but the transformer's."""
    try:
        index = read_json(pipeline / INDEX)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{pipeline / INDEX} is damaged ({error})") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{pipeline / INDEX} is damaged: it holds no components")
    names = [name for name, value in index.items() if isinstance(value, list)]
    present = {path.name for path in pipeline.iterdir() if path.is_dir()}
    return [name for name in names if name != TRANSFORMER and name in present]
