"""Checkpoints of a run: written aside while training goes on, whole or absent, read by any ranks.

    out/checkpoints/step-00001000/     tensors by torch.distributed.checkpoint (DCP), progress.json
    out/checkpoints/.step-00002000     one that is being written, or was when the run was killed

A step's checkpoint gets its name when every rank has written its part and the files are on the
disk, so the newest one with a name is good. Tensors are saved under their parameters' names and
cut anew for the ranks that load them: another number of ranks, or another way to share.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pixart_rt.errors import CheckpointError
from pixart_rt.training.process_group import Ranks

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
    identity: dict[str, Any] = field(default_factory=dict)  # what must be the same to go on


class Checkpoints:
    """The checkpoints of one run folder. One may be in flight."""

    def __init__(self, out: Path, ranks: Ranks, keep: int = 3) -> None:
        self.folder, self.ranks, self.keep = Path(out) / FOLDER, ranks, keep
        self._writing: tuple[Progress, Future[Any]] | None = None

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
            return Progress(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); remove that checkpoint to go on from the one "
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
        future = async_save(state, checkpoint_id=aside, process_group=self.ranks.writers)
        self._writing = progress, cast("Future[Any]", future)

    def poll(self) -> None:
        """Name the checkpoint in flight if it is written. Call it now and then."""
        if self._writing is not None and self._writing[1].done():
            self.finish()

    def agreed_steps(self) -> list[int]:
        """`steps` as the first rank sees them: a collective, as files may reach others later."""
        seen = [self.steps()]
        dist.broadcast_object_list(seen, src=0, group=self.ranks.writers)
        return seen[0]

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the one in flight, at most `timeout` seconds.

        Raises CheckpointError where it could not be written, or not in time.
        """
        if self._writing is None:
            return
        (progress, future), self._writing = self._writing, None
        try:
            future.result(timeout)
        except _FAILURES as error:  # of the writing thread: a full disk, a lost folder
            raise CheckpointError(
                f"the checkpoint after step {progress.step} could not be written to {self.folder} "
                f"({_last_line(error)}); free space there and start again: the run goes on from "
                f"{self.steps()[-1:] or 'its beginning'}"
            ) from error
        if self.ranks.is_first:  # DCP's own file is written last, by this rank
            aside = self._aside(progress.step)
            with (aside / PROGRESS).open("w") as file:
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
                "model: remove it to go on from the one before, or start in another folder"
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
