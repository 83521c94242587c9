"""A folder of images with a subfolder for each class, as ImageNet comes: labels, no captions.

    images/
      n01440764/10026.JPEG     label 0: subfolders count in the order of their names,
      n01443537/a/7.png        label 1  as torchvision's ImageFolder and so DiT's checkpoints do

Images may lie in folders of their own inside a class. Hidden folders and files that are no images
by their suffix are ignored. An image has no caption, so its text is that of the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_rt.data.folder import METADATA, Entry, ImageFolder
from pixart_rt.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)


class ClassFolder:
    """The images of `root`, class by class, in the order of their paths: folder[i] is an Entry.

    `classes` are the subfolders' names and `labels` [images] int64 index them. Names are listed
    once, when this is made, and kept as bytes: 10 MB for ImageNet. Raises DataError for a folder
    without classes, a class without images, and names that are not UTF-8.
    """

    caption_column = None

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root} is no folder; give one with a subfolder for each class")
        self.classes = tuple(_subfolders(self.root))
        if not self.classes:
            raise DataError(f"{root} has no subfolders; give each class one, named after it")
        names = []
        counts = []
        for name in self.classes:
            found = [f"{name}/{each}" for each in _images(self.root / name)]
            if not found:
                raise DataError(
                    f"class {name} of {root} has no image ({', '.join(sorted(SUFFIXES))}); "
                    "labels count the subfolders, so take it away if it is no class"
                )
            names += [_encoded(each) for each in found]
            counts.append(len(found))
        self.labels: npt.NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._names = b"".join(names)
        self._ends = np.cumsum([len(each) for each in names])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        name = self._names[start : int(self._ends[index])].decode()
        return Entry(name, self.root / name, "", int(self.labels[index]))

    def digest(self) -> str:
        """A hash of all names, which says whether the data set is still the same."""
        ends = self._ends.astype("<i8").tobytes()
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (ends, self._names):
            digest.update(part)
        return digest.hexdigest()


def open_images(
    root: Path, caption_column: str = "text", *, classes: bool | None = None
) -> ImageFolder | ClassFolder:
    """The data set in a folder: of classes or of captions, or what is there, captions first."""
    root = Path(root)
    if classes is None:
        classes = root.is_dir() and not _has_metadata(root) and _has_classes(root)
    return ClassFolder(root) if classes else ImageFolder(root, caption_column)


def _has_metadata(root: Path) -> bool:
    return (root / METADATA).is_file() or next(root.rglob(METADATA), None) is not None


def _has_classes(root: Path) -> bool:
    return any(next(_images(root / name), None) is not None for name in _subfolders(root))


def _subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(each.name for each in entries if each.is_dir() and each.name[0] != ".")


def _images(folder: Path) -> Iterator[str]:
    """Paths of images below a folder, relative to it."""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(each for each in folders if each[0] != ".")
        inside = Path(path).relative_to(folder)
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield (inside / name).as_posix()


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {name!r} is not UTF-8; rename it") from error
