"""Reads the tensors of a checkpoint folder one at a time: safetensors, sharded or not, or .bin.

Nothing is unpickled without `weights_only=True`.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json

SAFETENSORS_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
BIN_NAMES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
LONGEST_NAME = 200  # of a class in a pickle; PyTorch's own have less than 60 characters
LFS_POINTER = b"version https://git-lfs"


class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name; each is read when it is asked for, each file opened once.

    Tensors of safetensors files are views of the mapped file: they take memory as they are used.
    Raises CheckpointError when the folder holds no weights or a file is truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_files(self.folder)
        self._loaded: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        self._opened: dict[Path, safe_open] = {}
        for path in self.files:
            if path.suffix == ".bin":
                tensors = read_pickle(path)
                self._loaded.update(tensors)
                self._file_of.update(dict.fromkeys(tensors, path))
            else:
                self._opened[path] = open_safetensors(path)
                self._file_of.update(dict.fromkeys(self._opened[path].keys(), path))

    def __getitem__(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}; is it another model?")
        return self._opened[self._file_of[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_safetensors(path: Path) -> safe_open:
    """Open a .safetensors file, or say in one line that it is truncated or another format."""
    _refuse_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not safetensors ({error}); download or convert it again"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The dict in a .bin or .pth file, read with `weights_only=True`."""
    _refuse_pointer(path)
    if longest_name(path) > LONGEST_NAME:
        raise CheckpointError(f"{path} is damaged or holds more than tensors; download it again")
    try:
        mmap = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote another format
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise anything, from any of its instructions
        # PyTorch's own line advises to load the file with weights_only=False: to run what is in it.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "" if refused else f" ({first_line(error)})"
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors{reason}; download it again"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors")
    return loaded


def longest_name(path: Path) -> int:
    """The length of the longest class or function that a pickled file names, as far as it is read.

    PyTorch refuses what it does not know in a message whose search takes quadratic time.
    """
    longest = 0
    files: list[IO[bytes]]
    with suppress(Exception), ExitStack() as opened:  # of a damaged file PyTorch says what it is
        if zipfile.is_zipfile(path):
            archive = opened.enter_context(zipfile.ZipFile(path))
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            files = [opened.enter_context(archive.open(name)) for name in names]
        else:  # five pickles after each other, then the storages
            files = [opened.enter_context(path.open("rb"))] * 5
        for file in files:
            for opcode, value, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    longest = max(longest, len(str(value)))
    return longest


def first_line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refuse_pointer(path: Path) -> None:
    """CheckpointError for what Git LFS leaves in place of a large file that was not fetched."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


def _weight_files(folder: Path) -> list[Path]:
    names = (*SAFETENSORS_NAMES, *BIN_NAMES)
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(names)}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each of which must be there."""
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        present = {path.name for path in index.parent.iterdir()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); download it again") from error
    missing = [shard for shard in shards if shard not in present]  # also what is no name in it
    if missing:
        raise CheckpointError(f"{index.parent} lacks {missing[0]}, which its index names")
    return [index.parent / shard for shard in shards]
