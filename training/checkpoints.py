"""Checkpoints of a run: written aside while training continues, whole or absent, read by any ranks.

    out/checkpoints/step-00001000/     tensors by torch.distributed.checkpoint (DCP), progress.json
    out/checkpoints/.step-00002000     one that is being written, or was when the run was killed

A step's checkpoint gets its name when every rank has written its part and the files are on the
disk, so every one with a name was whole. progress.json has the files' checksums: a checkpoint that
was damaged since is passed over, with a warning, for the one before. Tensors are saved under their
parameters' names and cut anew for the ranks that load them: another number of ranks, or another way
to share.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json
from pixart_rt.training.process_group import Ranks

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8,})")
State = dict[str, Any]
_FAILURES = (Exception, CheckpointException)  # DCP wraps any rank's error in a BaseException


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run was. All random numbers follow from the step (pixart_rt/data/batch.py)."""

    step: int  # steps done
    skipped: int = 0  # of them not finite, and left out
    identity: dict[str, Any] = field(default_factory=dict)  # must be equal to resume
    files: dict[str, str] = field(default_factory=dict)  # of the checkpoint, with checksums


class Checkpoints:
    """The checkpoints of one run folder. One may be in flight."""

    def __init__(self, out: Path, ranks: Ranks, keep: int = 3) -> None:
        self.folder, self.ranks, self.keep = Path(out) / FOLDER, ranks, keep
        self._writing: tuple[Progress, Future[Any]] | None = None
        self._summing = ThreadPoolExecutor(1, "checksums")  # gigabytes: not in the training loop

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(each.name) for each in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is, or would be."""
        return self.folder / f"step-{step:08d}"

    def progress(self, step: int) -> Progress:
        """What the checkpoint says of its run. Raises CheckpointError where it is damaged."""
        path = self.path(step) / PROGRESS
        try:
            return Progress(**read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); remove that checkpoint to resume from the one "
                "before"
            ) from error

    def save(self, state: State, progress: Progress) -> None:
        """Begin to write on all ranks; waits only for the one before, and for a copy on the host.

        The state may change as soon as this returns.
        """
        self.finish()
        aside = self._aside(progress.step)
        if self.ranks.is_first:
            self._clean()
            self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        written = cast(
            "Future[Any]",
            async_save(state, checkpoint_id=aside, process_group=self.ranks.writers),
        )
        if not self.ranks.is_first:
            self._writing = progress, written
            return

        def summed() -> dict[str, str]:
            written.result()  # DCP's own file is written last, by this rank
            return checksums(aside)

        self._writing = progress, self._summing.submit(summed)

    def poll(self) -> None:
        """Name the checkpoint in flight if it is written. Call it now and then."""
        if self._writing is not None and self._writing[1].done():
            self.finish()

    def damage(self, step: int) -> str:
        """The first thing that is wrong with a checkpoint's files; empty if nothing is."""
        try:
            files = self.progress(step).files
        except CheckpointError:
            return f"{PROGRESS} cannot be read"
        for name, expected in files.items():
            path = self.path(step) / name
            if not path.is_file():
                return f"{name} is missing"
            if checksum(path) != expected:
                return f"{name} has changed"
        return ""

    def newest_whole(self) -> int | None:
        """The newest step whose files are as they were written; None where there is none at all.

        A collective. Warns of damaged ones that are newer; raises CheckpointError where all are
        damaged.
        """
        seen: list[tuple[int | None, list[str]]] = [(None, [])]
        if self.ranks.is_first:
            damaged: list[str] = []
            whole = None
            for step in reversed(self.steps()):
                reason = self.damage(step)
                if not reason:
                    whole = step
                    break
                damaged.append(f"{self.path(step)} is damaged ({reason})")
            seen = [(whole, damaged)]
        dist.broadcast_object_list(seen, src=0, group=self.ranks.writers)
        newest, bad = seen[0]
        if bad and newest is None:
            raise CheckpointError(
                f"{'; '.join(bad)}: nothing is left to resume from; remove {self.folder} to begin "
                "anew, or restore it from a backup"
            )
        if self.ranks.is_first:
            for line in bad:
                logger.warning("%s; resuming from step %s, the newest whole one", line, newest)
        return newest

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the one in flight, at most `timeout` seconds.

        Raises CheckpointError where it could not be written, or not in time.
        """
        if self._writing is None:
            return
        (progress, future), self._writing = self._writing, None
        try:
            result = future.result(timeout)
        except _FAILURES as error:  # of the writing thread: a full disk, a lost folder
            raise CheckpointError(
                f"the checkpoint after step {progress.step} could not be written to {self.folder} "
                f"({_last_line(error)}); free space there and start again: the run resumes from "
                f"{self.steps()[-1:] or 'its beginning'}"
            ) from error
        if self.ranks.is_first:
            aside = self._aside(progress.step)
            progress = replace(progress, files=result)
            with (aside / PROGRESS).open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(progress), indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._remove(progress.step)
            aside.rename(self.path(progress.step))
            _sync_folder(self.folder)
            for step in self.steps()[: -self.keep]:
                self._remove(step)

    def load(self, state: State, step: int) -> None:
        """Fill `state`, whose tensors are as this rank holds them, from a checkpoint.

        Raises CheckpointError where it is damaged, or of another model.
        """
        path = self.path(step)
        try:
            load(state, checkpoint_id=path, process_group=self.ranks.writers)
        except _FAILURES as error:
            raise CheckpointError(
                f"{path} cannot be loaded ({_last_line(error)}); it is damaged or of another "
                "model: remove it to resume from the one before, or start in another folder"
            ) from error

    def _aside(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def _remove(self, step: int) -> None:
        """Take the name first, so that half a checkpoint never has one."""
        if self.path(step).exists():
            gone = self.folder / f".step-{step:08d}-gone"
            self.path(step).rename(gone)
            shutil.rmtree(gone)

    def _clean(self) -> None:
        """Remove what a run that was killed left unfinished."""
        if self.folder.is_dir():
            for each in self.folder.glob(".step-*"):
                if _NAME.fullmatch(each.name[1:].removesuffix("-gone")):
                    shutil.rmtree(each)


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder, by name."""
    return {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}


def checksum(path: Path) -> str:
    """A file's size and CRC-32: it finds a damaged disk, at a few GB a second."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return f"{path.stat().st_size} {value:08x}"


def remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a run folder. What else is in there stays."""
    folder = Path(out) / FOLDER
    for each in list(folder.iterdir()) if folder.is_dir() else ():
        if _NAME.fullmatch(each.name.removeprefix(".").removesuffix("-gone")):
            shutil.rmtree(each)
    with suppress(OSError):  # not empty: something of the user's is in it
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """The names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
