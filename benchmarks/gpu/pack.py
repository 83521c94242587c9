"""Copies of what was measured so far, in a folder that survives: one JSON and one archive.

The benchmarks write elsewhere. Every few seconds the report is written next to the last one
and takes its place, so that a run that is killed leaves whole files.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from pixart_rt.bench.provenance import first_line
from pixart_rt.files import replacing

EVERY = 10.0  # seconds between two copies
LARGEST_FILE = 400_000  # bytes of one part or log in the archive; of a longer one its end
LEFT_OUT = ("weights", "gpu.lock")


class Packer:
    """Writes NAME.json and NAME.tar.gz to `out`, at once, every EVERY seconds and at the end."""

    def __init__(
        self, collect: Callable[[], dict[str, Any]], parts: Path, out: Path, name: str
    ) -> None:
        self._collect, self._parts, self._out, self._name = collect, parts, out, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Packer:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.write()

    def _repeat(self) -> None:
        while not self._stop.wait(EVERY):
            self.write()

    def write(self) -> None:
        """The archive first: a report that cannot be made must not cost what was measured."""
        self._write_archive()
        try:
            found = self._collect()
        except Exception as error:
            found = {"report_failed": first_line(error)}
        report.write(self._out / f"{self._name}.json", found)

    def _write_archive(self) -> None:
        with (
            replacing(self._out / f"{self._name}.tar.gz") as new,
            tarfile.open(new, "w:gz", compresslevel=5) as archive,
        ):
            for path in sorted(self._parts.iterdir()):
                if path.is_file() and path.name not in LEFT_OUT:
                    self._add(archive, path)

    @staticmethod
    def _add(archive: tarfile.TarFile, path: Path) -> None:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - LARGEST_FILE))
            info = tarfile.TarInfo(path.name)
            info.size = min(size, LARGEST_FILE)
            archive.addfile(info, file)
