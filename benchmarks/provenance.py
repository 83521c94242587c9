"""Result files of the benchmarks: where they lie, and what each carries beside its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pixart_rt.bench.provenance import provenance as facts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """Commit (with `+` for uncommitted changes), command line, library versions, hardware, date."""
    return facts(" ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]))


def write_result(name: str, values: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write {provenance, **values} as benchmarks/results/NAME.json, aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps({**provenance(), **values}, indent=1) + "\n")
    temporary.rename(path)
    return path
