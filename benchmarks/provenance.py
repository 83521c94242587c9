"""Where the benchmarks' results lie: files in benchmarks/results, tables between a page's markers.

What a result carries, and how it is written, is pixart_rt/bench/provenance.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_rt.bench.provenance import ResultFile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def result_file(path: Path | None, name: str, *, measured: bool) -> ResultFile:
    """For `path`; None stands for NAME.json in RESULTS, and for no file if nothing is measured."""
    return ResultFile(path or (RESULTS / f"{name}.json" if measured else None))


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write {provenance, **values} as benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    ResultFile(path)(values)
    return path


def write_sections(doc: Path, sections: Mapping[str, str]) -> None:
    """Put each text between the markers <!-- NAME:begin --> and <!-- NAME:end --> of a page."""
    text = doc.read_text(encoding="utf-8")
    for name, body in sections.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        head, rest = text.split(begin)
        text = head + begin + body + end + rest.split(end)[1]
    doc.write_text(text, encoding="utf-8")
