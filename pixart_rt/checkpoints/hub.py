"""Where a model's files are: `tiny` in the package, a path as it is, or the hub's files fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pixart_rt
from pixart_rt.errors import CheckpointError

TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"
VOCABULARY = "vocabulary.txt"  # of tiny: the words of all captions that it was trained on


def locate(model: str, folders: Sequence[str]) -> Path:
    """The local path of `model`; of a hub id, only `folders` and the index are downloaded.

    Raises CheckpointError when it is nowhere.
    """
    if model == "tiny":
        return TINY
    path = Path(model)
    if path.exists():
        return path
    if path.suffix or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"model {model!r} is no file or folder here, nor a hub id like "
            "PixArt-alpha/PixArt-XL-2-1024-MS; check the path, or use --model tiny"
        )
    return _download(model, folders)


def unseen_words(model: str, text: str) -> list[str]:
    """The words of a prompt, in order, that `model` was never trained on, where that is known.

    It is known of "tiny" alone, which draws something all the same.
    """
    if model != "tiny":
        return []
    known = set((TINY / VOCABULARY).read_text(encoding="utf-8").split())
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in known]


def locate_whole(option: str, model: str, folders: Sequence[str]) -> Path:
    """`locate`, and CheckpointError that names `option` where a pipeline lacks one of `folders`."""
    path = locate(model, folders)
    missing = [name for name in folders if not (path / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{option} {model} was requested, but it has no {', '.join(missing)}; give a whole "
            "pipeline folder, as diffusers writes it, or tiny"
        )
    return path


def transformer_path(folder: Path, model: str, resolution: int | None) -> Path:
    """What read_transformer is given for `model` at `folder`: tiny has one more, for 256 pixels."""
    return folder / "transformer_256" if model == "tiny" and resolution == 256 else folder


def _download(model: str, folders: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    wanted = ["model_index.json", *(f"{folder}/*" for folder in folders)]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{model} could not be downloaded ({reason}); check the name and the network, or use "
            "the model that comes with pixart_rt: --model tiny"
        ) from error
