"""`pixart-rt verify`: is a bundle still what its manifest says?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pixart_rt.bundle import Manifest
from pixart_rt.cli.console import Steps, print_json, print_tables
from pixart_rt.cli.failures import FAILED

_MARKS = {True: "ok", False: "FAILED", None: "not run"}


def verify(
    bundle: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `pixart-rt build` made.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check that a bundle is intact.

    Files are compared with their hashes, engines' outputs with the references in the bundle. The
    exit code is 1 if a check failed. A check that cannot run on this machine (an engine for a GPU
    that is not here) is reported and does not fail.

    \b
    Examples:
      pixart-rt verify engines/tiny-1024
      pixart-rt verify engines/tiny-1024 --json
    """
    Manifest.read(bundle)  # a folder that is no bundle is refused before torch is loaded
    with Steps() as progress:
        from pixart_rt.export.numerics import verify_bundle

        results = verify_bundle(bundle, progress)
    passed = all(result.ok is not False for result in results)
    if as_json:
        print_json({"ok": passed, "checks": [asdict(result) for result in results]})
    else:
        table = Table("check", "result", "detail")
        for result in results:
            table.add_row(result.name, _MARKS[result.ok], escape(result.detail))
        print_tables(table)
    if not passed:
        raise typer.Exit(FAILED)
