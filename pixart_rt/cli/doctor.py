"""`pixart-rt doctor`: what this machine has, which backends work, and the fix for each other."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from pixart_rt.cli.console import Steps, print_json, print_lines, print_tables


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report what works on this machine.

    GPU, driver, libraries and backends, with the fix for each that does not work.

    \b
    Examples:
      pixart-rt doctor
      pixart-rt doctor --json
    """
    with Steps() as progress:
        progress("asking the libraries", 0, 1)
        from pixart_rt.doctor import report  # asks torch

        found = report()
    if as_json:
        print_json(found)
    else:
        print_tables(_machine(found), _backends(found))
        print_lines(_fixes(found))


def _machine(found: dict[str, Any]) -> Table:
    table = Table(Column("this machine", no_wrap=True), Column("", overflow="fold"))
    for name, value in found["machine"].items():
        table.add_row(name, escape(str(value)))
    gpus = [_gpu(gpu) for gpu in found["gpus"]]
    table.add_row("gpu", escape("\n".join(gpus) or "none that PyTorch can use"))
    table.add_row("driver", escape(found["driver"] or "none found"))
    table.add_row("builds for", ", ".join(found["builds"]) or "this machine only")
    for name, version in found["libraries"].items():
        table.add_row(name, version or "not installed")
    return table


def _gpu(gpu: dict[str, Any]) -> str:
    line = f"{gpu['name']} ({gpu['target']}, {gpu['memory_gib']} GiB)"
    return line if gpu["ok"] else f"{line}: not usable, {gpu['reason']}"


def _backends(found: dict[str, Any]) -> Table:
    table = Table(Column("backend", no_wrap=True), Column("works", no_wrap=True), Column("why"))
    for backend in found["backends"]:
        works = "yes" if backend["ok"] else "no"
        table.add_row(backend["name"], works, escape(backend["reason"]))
    table.add_row("auto", found["auto"]["name"], escape(found["auto"]["reason"]))
    return table


def _fixes(found: dict[str, Any]) -> list[str]:
    """A line for each fix, below the tables: a cell would break commands that users copy."""
    broken = [item for item in (*found["gpus"], *found["backends"]) if not item["ok"]]
    lines = [f"  {item['name']}: {item['fix']}" for item in broken if item["fix"]]
    return ["what does not work, and the fix:", *lines] if lines else []
