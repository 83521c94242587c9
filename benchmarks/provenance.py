"""Result files of the benchmarks: where they lie, and what each carries beside its figures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pixart_rt.bench.provenance import provenance as facts
from pixart_rt.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


COMMAND, COMMIT = "PIXART_RT_BENCH_COMMAND", "PIXART_RT_BENCH_COMMIT"


def provenance() -> dict[str, Any]:
    """Commit (with `+` for uncommitted changes), command line, library versions, hardware, date.

    A script that starts benchmarks names its own command, and the commit of sources that lie
    outside a checkout, by the environment variables of COMMAND and COMMIT.
    """
    own = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    found = facts(os.environ.get(COMMAND, own))
    return found | ({"commit": os.environ[COMMIT]} if os.environ.get(COMMIT) else {})


class Saver:
    """Writes a benchmark's values after every row, so that one that is stopped loses none.

    `path` None stands for benchmarks/results/NAME.json, and for nothing where nothing is measured.
    """

    def __init__(self, path: Path | None, name: str, *, measured: bool) -> None:
        self.path = path or (RESULTS / f"{name}.json" if measured else None)
        self._facts = provenance() if self.path else {}

    def __call__(self, values: dict[str, Any]) -> None:
        if self.path is not None:
            with replacing(self.path) as new:
                new.write_text(
                    json.dumps({**self._facts, **values}, indent=1) + "\n", encoding="utf-8"
                )

    def earlier(self, key: str) -> list[dict[str, Any]]:
        """The rows that a run before this one saved under a key; none if there was no such run."""
        if self.path is None or not self.path.is_file():
            return []
        rows: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))[key]
        return rows


def first_line(error: BaseException) -> str:
    """What went wrong, for a row of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def write_result(name: str, values: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write {provenance, **values} as benchmarks/results/NAME.json, aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps({**provenance(), **values}, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)
    return path
