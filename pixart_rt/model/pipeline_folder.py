"""A transformer written where its user wants it: a .pth, a transformer folder, a whole pipeline.

A pipeline folder is a copy of another one with this transformer in it, so `pixart-rt build --model`
and diffusers take it as they took that one. Other components are copied, not linked: tools that
save into a folder would write through links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.files import replacing
from pixart_rt.model.checkpoint import TransformerCheckpoint, write_diffusers, write_pth

INDEX = "model_index.json"
TRANSFORMER = "transformer"
COMPONENTS = (TRANSFORMER, "vae", "text_encoder", "tokenizer", "scheduler")  # of a PixArt pipeline


def is_pipeline(path: Path) -> bool:
    return (path / INDEX).is_file()


def check_target(out: Path, force: bool) -> None:
    """ConfigError for a target that may not be written, before the work that makes it."""
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; choose another name, or overwrite it with --force")


def write_model(
    checkpoint: TransformerCheckpoint,
    out: Path,
    *,
    pipeline: Path | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Write a .pth if `out` has that suffix; else with `pipeline` a copy of that folder with this
    transformer; else a transformer folder. Returns the summary of what was written. `finish` is
    called with the pipeline folder before it takes its place, for what else differs in it.

    Whole or absent. Replaces a folder of its own kind or an empty one: CheckpointError for others.
    """
    out = Path(out)
    if out.suffix == ".pth":
        return write_pth(checkpoint, out)
    if pipeline is None:
        return write_diffusers(checkpoint, out)
    if out.exists() and not is_pipeline(out) and not _is_empty(out):
        raise CheckpointError(f"{out} exists and is no pipeline folder; choose another")
    with replacing(out) as temporary:
        temporary.mkdir()
        for name in _components(pipeline):
            shutil.copytree(pipeline / name, temporary / name)
        shutil.copyfile(pipeline / INDEX, temporary / INDEX)
        summary = write_diffusers(checkpoint, temporary / TRANSFORMER)
        finish(temporary)
    return summary | {"target": str(out)}


def _components(pipeline: Path) -> list[str]:
    """The folders that a pipeline's index names, but the transformer's."""
    try:
        index = json.loads((pipeline / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{pipeline / INDEX} is damaged ({error})") from error
    names = [name for name, value in index.items() if isinstance(value, list)]
    return [name for name in names if name != TRANSFORMER and (pipeline / name).is_dir()]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
