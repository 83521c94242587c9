"""Files and folders that are whole or absent: written aside, then renamed into place; and locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A free path in a temporary folder beside `target`; what is made there takes its place.

    An error inside the block leaves `target` as it was and nothing beside it.
    """
    target = Path(target).resolve()  # the parent of "." is "." itself
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield workplace / "new"
        if target.is_dir():
            os.rename(target, workplace / "old")
        try:
            os.replace(workplace / "new", target)
        except OSError:
            if (workplace / "old").exists():
                os.rename(workplace / "old", target)
            raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work on what `path` stands for; free again when the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
