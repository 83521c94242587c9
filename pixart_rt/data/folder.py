"""A folder of images with captions, by the ImageFolder convention of Hugging Face `datasets`.

    images/
      metadata.jsonl      {"file_name": "a/0001.jpg", "text": "a red circle"}   one line an image
      a/0001.jpg          paths are relative to the metadata.jsonl that names them

Where the root has no metadata.jsonl, those of its subfolders are read, in the order of their paths.
Lines are found once and parsed when asked, so ten million captions do not lie in memory. Images
that no line names are not part of the data set; two lines may name the same image.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pixart_rt.errors import DataError
from pixart_rt.files import check_source, parse_json
from pixart_rt.model.captions import without_lone_surrogates

METADATA = "metadata.jsonl"
CHUNK = 1 << 26  # bytes searched for line ends at a time
SHORTEST = len(b"{}\n")  # what is shorter is a blank line


@dataclass(frozen=True, slots=True)
class Entry:
    """One image and its caption."""

    file_name: str  # relative to the root
    path: Path
    caption: str
    label: int | None = None  # where the data set has classes


class Images(Protocol):
    """A data set before it is encoded: ImageFolder, or ClassFolder (class_folder.py)."""

    root: Path

    @property
    def caption_column(self) -> str | None: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels index; none where images have captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry: ...

    def digest(self) -> str: ...


class ImageFolder:
    """The images that the metadata of `root` names: folder[i] is the i-th line's Entry.

    Raises DataError when there is no metadata or its first line has no such caption column;
    folder[i] raises DataError for a line that is no record of an image.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, root: Path, caption_column: str = "text") -> None:
        self.root, self.caption_column = Path(root), caption_column
        self._files = [_Lines(path) for path in _metadata_files(self.root)]
        self._ends = np.cumsum([len(lines) for lines in self._files])
        if not len(self):
            raise DataError(f"{self._files[0].path} is empty; it needs one line for every image")
        self._check_first()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        lines = self._files[which]
        number = index - int(self._ends[which]) + len(lines)
        record = lines.record(number)
        where = f"{lines.path.name} line {lines.line_number(number)}"
        name, caption = record.get("file_name"), record.get(self.caption_column)
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} has no file_name")
        if name.startswith("/") or "\0" in name or name != without_lone_surrogates(name):
            raise DataError(f"{where}: file_name {name!r} is no relative path in UTF-8")
        if not isinstance(caption, str):
            raise DataError(f"{where} ({name}) has no text in column {self.caption_column!r}")
        path = lines.path.parent / name
        return Entry(path.relative_to(self.root).as_posix(), path, without_lone_surrogates(caption))

    def __reduce__(self) -> tuple[type[ImageFolder], tuple[Path, str]]:
        return ImageFolder, (self.root, self.caption_column)  # a worker maps the files itself

    def digest(self) -> str:
        """A hash of all metadata, which says whether the data set is still the same."""
        digest = hashlib.sha256()
        for lines in self._files:
            name = lines.path.relative_to(self.root).as_posix()
            digest.update(json.dumps([name, lines.sha256()]).encode())
        return digest.hexdigest()

    def _check_first(self) -> None:
        """A wrong --caption-column would otherwise skip every image, one by one."""
        first = next(lines for lines in self._files if len(lines))
        columns = [key for key, value in first.record(0).items() if isinstance(value, str)]
        if self.caption_column not in columns:
            others = [key for key in columns if key != "file_name"]
            raise DataError(
                f"{first.path} has no text column {self.caption_column!r}, it has "
                f"{', '.join(others) or 'none'}; name one with --caption-column"
            )


def _metadata_files(root: Path) -> list[Path]:
    check_source(root, f"images and a {METADATA}")
    if (root / METADATA).is_file():
        return [root / METADATA]
    found = sorted(root.rglob(METADATA))
    if not found:
        raise DataError(
            f"{root} has no {METADATA}; write one with a line for every image, such as "
            '{"file_name": "0001.jpg", "text": "a red circle"}, or give each class a subfolder'
        )
    return found


class _Lines:
    """The lines of one metadata file that are not blank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _mapped(path)
        ends = _line_ends(self._data)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        self._lines = np.flatnonzero(ends - starts >= SHORTEST)
        self._starts, self._stops = starts[self._lines], ends[self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def line_number(self, number: int) -> int:
        """As an editor counts, from 1."""
        return int(self._lines[number]) + 1

    def record(self, number: int) -> dict[str, Any]:
        text = self._data[int(self._starts[number]) : int(self._stops[number])]
        where = f"{self.path.name} line {self.line_number(number)}"
        try:
            record = parse_json(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object")
        return record

    def sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()


def _mapped(path: Path) -> mmap.mmap | bytes:
    if not path.stat().st_size:
        return b""  # which cannot be mapped
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_ends(data: mmap.mmap | bytes) -> np.ndarray:
    """Byte offsets just after every line [lines] int64; the last line may lack its newline."""
    parts = [
        np.flatnonzero(np.frombuffer(data[begin : begin + CHUNK], np.uint8) == ord("\n"))
        + begin
        + 1
        for begin in range(0, len(data), CHUNK)
    ]
    if data and data[-1] != ord("\n"):
        parts.append(np.array([len(data)]))
    return np.concatenate([np.zeros(0, np.int64), *parts])
