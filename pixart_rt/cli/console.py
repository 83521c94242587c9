"""What the commands show: progress and notes on stderr, the one result on stdout."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pixart_rt.stderr_console import stderr

WHOLE_RUN = 1e9  # seconds: the ETA averages over all steps so far, not the last half minute


def note(message: str) -> None:
    """One line on stderr."""
    stderr().print(message, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_tables(*tables: Table) -> None:
    console = Console(highlight=False)
    for table in tables:
        console.print(table)


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout that the terminal wraps, not we: a command in one stays whole when copied."""
    for line in lines:
        typer.echo(line)


class Steps:
    """A bar with elapsed and remaining time; where stderr is no terminal, a line per step.

    Called as `steps(name, done, total)`, which is the progress callback of the library.
    """

    def __init__(self) -> None:
        self._terminal = stderr().is_terminal
        self._last = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=stderr(),
            speed_estimate_period=WHOLE_RUN,
            transient=True,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._terminal:
            self._bar.update(self._task, description=name, completed=done, total=total)
        elif name != self._last:
            note(f"[{done}/{total}] {name}")
        self._last = name


class _NoteHandler(logging.Handler):
    """The library's log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        note(prefix + record.getMessage())


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the library's INFO lines and warnings while a command runs."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what they say of each other's versions
    logger = logging.getLogger("pixart_rt")
    handler, level = _NoteHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
