"""The progress callback of programs that take minutes: train_lora(..., progress=callback)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pixart_rt.training.process_group import Ranks


class Progress(Protocol):
    """Called on the first rank alone."""

    def __call__(self, name: str, done: int, total: int, /) -> None:
        """`done` of `total` parts of the work called `name` are finished."""


def silent(_name: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


def on_first(ranks: Ranks, progress: Progress) -> Progress:
    """The callback on the first rank, `silent` on the others."""
    return progress if ranks.is_first else silent
