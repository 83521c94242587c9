"""The rows of a benchmark's file: no number without its truth.

A row has what was measured or the error that was raised, and names the kernels that the self-test
refused: those are replaced by their references, so that "ours fused" may be PyTorch's operators.
What was not run is listed with the reason. The file is written after every row.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pixart_rt.bench.provenance import ResultFile, first_line
from pixart_rt.kernels import catalog
from pixart_rt.kernels.launch import refused_lines

RESUME = "--resume"
EVERY = tuple(operator.name for operator in catalog.OPERATORS)
Row = dict[str, Any]


class Rows:
    """Measures row by row. `values` are what the file has besides "rows" and "not_run".

    A program that knows RESUME says whether it was given; it is run anew where the GPU no longer
    answers its process.
    """

    def __init__(
        self,
        save: ResultFile,
        told: Callable[[Row], str],
        *,
        values: dict[str, Any],
        minutes: float = float("inf"),
        resume: bool | None = None,
        derived: Callable[[list[Row]], dict[str, Any]] = lambda rows: {},
    ) -> None:
        self._save, self._told, self._values, self._derived = save, told, values, derived
        self._restarts = resume is not None
        self._end = time.monotonic() + 60 * minutes
        self.rows = save.earlier("rows") if resume else []
        self.not_run: list[Row] = []

    def leave_out(self, row: Row, because: str) -> None:
        self.not_run.append(row | {"because": because})

    def add(self, row: Row, measure: Callable[[], Row]) -> None:
        """Complete `row` by what `measure` returns, or by its error; other rows follow.

        `measure` may also write into `row`, so that an error leaves what was known before it. A row
        that an earlier run saved is not measured again, nor is one that begins too late.
        """
        if any(row.items() <= before.items() for before in self.rows):
            return
        if time.monotonic() > self._end:
            self.leave_out(row, "time")
            return
        try:
            row |= measure()
        except Exception as error:  # Triton's errors have no base but Exception
            row |= failure(error)
        self.rows.append(row | {"refused_kernels": refused_lines()})
        print(self._told(self.rows[-1]), flush=True)
        self._save(self.values())
        if self._restarts and "failed" in row and not usable():
            start_again()

    def values(self) -> dict[str, Any]:
        """The file's values, without provenance."""
        rows = {"rows": self.rows, "not_run": self.not_run}
        return {**self._values, **rows, **self._derived(self.rows)}

    def end(self, **more: Any) -> int:
        """Write the file a last time, with `more` in it. The exit code: 1 if a row is wrong."""
        self._values |= more
        self._save(self.values())
        return 0 if all(row.get("agrees", "not_run" in row) for row in self.rows) else 1


def kernels_tested(device: torch.device, *dtypes: torch.dtype, training: bool = False) -> None:
    """Compare every kernel with its reference on this GPU. Without a GPU there is nothing to do."""
    if device.type == "cuda":
        self_test: Any = catalog.self_test
        for dtype in dtypes:
            self_test(device, dtype, EVERY, training=training)


def failure(error: Exception) -> Row:
    """The end of a row whose measurement raised."""
    return {"agrees": False, "failed": first_line(error)}


def usable() -> bool:
    """Whether the GPU answers this process: after an illegal access every later call fails."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def start_again() -> None:
    """Run this program anew, with what it has saved: the GPU does not answer this process."""
    words = [word for word in sys.orig_argv if word != RESUME]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words[1:], RESUME])
