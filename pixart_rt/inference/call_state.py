"""The state of one call of a pipeline: its turn, its cancel, its progress.

A pipeline serves one call at a time. A call's cancel is its own: it is heard before every step,
or where a CUDA graph replays all steps before every batch, before the decoder, and before the call
returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, RLock

from pixart_rt.errors import BackendError, Cancelled

Progress = Callable[[str, int, int], None]  # a name, steps done, steps in all


class Call:
    """One call in work."""

    def __init__(self, cancel: Event | None = None, progress: Progress | None = None) -> None:
        """cancel: the caller's own switch, which may be set at any time."""
        self._interrupted, self._cancel = Event(), cancel
        self._progress = progress
        self._done = self._total = 0

    def interrupt(self) -> None:
        self._interrupted.set()

    def check(self, where: str) -> None:
        """Raise Cancelled if this call is to stop. where: such as "before step 1 of 20"."""
        if self._interrupted.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise Cancelled(f"stopped {where}")

    def expect(self, num_steps: int) -> None:
        """Take so many steps for the whole call."""
        self._total = num_steps

    def batch(self, num_steps: int) -> Callable[[int], None]:
        """What the loop of the next batch calls before each step."""
        first = self._done
        self._done += num_steps

        def before(step: int) -> None:
            self.check(f"before step {step + 1} of {num_steps}")
            self._report("denoising", first + step)

        return before

    def decoding(self) -> None:
        """Called before the decoder runs on what the last batch made."""
        self.check("before the decoder")
        self._report("decoding", self._done)

    def _report(self, name: str, done: int) -> None:
        if self._progress is not None:
            self._progress(name, done, self._total)


class Turns:
    """Lets one thread at a time call; a callback may call again within its own turn."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = RLock()
        self._calls: list[Call] = []  # the present one, and those whose callbacks called it

    @contextmanager
    def take(self, call: Call) -> Iterator[None]:
        """Wait for the turn and hold it. Raises Cancelled if the call was stopped meanwhile, and
        BackendError in a fork of the process that loaded the pipeline.
        """
        if os.getpid() != self._process:  # thread pools and GPU contexts stay behind: it would hang
            raise BackendError(
                f"this pipeline was loaded in process {self._process} and called in its fork "
                f"{os.getpid()}, where it cannot run; load it in the child, or start children by "
                "multiprocessing's spawn"
            )
        with self._lock:
            call.check("before its turn")
            self._calls.append(call)
            try:
                yield
            finally:
                self._calls.remove(call)

    def interrupt(self) -> None:
        """Stop the call that has the turn; nothing where there is none."""
        for call in list(self._calls):
            call.interrupt()
