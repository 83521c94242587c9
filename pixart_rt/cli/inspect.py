"""`pixart-rt inspect`: a bundle's manifest as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from pixart_rt.bundle import ComponentEntry, Manifest
from pixart_rt.cli.console import print_tables


def inspect(
    bundle: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `pixart-rt build` made.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest itself.")] = False,
) -> None:
    """Show what a bundle holds.

    Model, engines, precision, parity with PyTorch, and the libraries that built it.

    \b
    Examples:
      pixart-rt inspect engines/tiny-1024
      pixart-rt inspect engines/tiny-1024 --json
    """
    manifest = Manifest.read(bundle)
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
    else:
        print_tables(_summary(bundle, manifest), _components(manifest))


def _summary(bundle: Path, manifest: Manifest) -> Table:
    table = Table("setting", _value(), title=escape(str(bundle)), title_justify="left")
    sizes = manifest.buckets
    rows: dict[str, Any] = {
        "key": manifest.key,
        "made by": f"pixart_rt {manifest.pixart_rt_version}, {manifest.created}",
        **{f"model: {name}": value for name, value in manifest.model.items()},
        **{f"engine: {name}": value for name, value in manifest.engine_config.items()},
        **{f"model config: {name}": value for name, value in manifest.model_config.items()},
        **{f"controlnet: {name}": value for name, value in (manifest.controlnet or {}).items()},
        **{f"vae: {name}": value for name, value in manifest.vae.items()},
        "scheduler": manifest.scheduler,
        "image sizes": f"{len(sizes)}, height x width from {_size(sizes, 0)} to {_size(sizes, -1)}",
        "files": len(manifest.all_files()),
        **{f"build: {name}": value for name, value in manifest.build.items()},
        **{f"version: {name}": value for name, value in manifest.versions.items()},
    }
    for name, value in rows.items():
        table.add_row(name, escape(_text(value)))
    return table


def _components(manifest: Manifest) -> Table:
    table = Table("component", "setting", _value())
    for name, entry in manifest.components.items():
        rows = {
            "backend": entry.backend,
            "precision": entry.precision,
            "targets": ", ".join(entry.targets) or "the machine that runs it",
            "engines": "\n".join(entry.parts),
            "shapes": _profiles(entry),
            **{f"parity: {figure}": value for figure, value in entry.parity.items()},
            **_plugins(entry),
        }
        for setting, value in rows.items():
            table.add_row(name, setting, escape(_text(value)))
            name = ""  # once per component
        table.add_section()
    return table


def _plugins(entry: ComponentEntry) -> dict[str, Any]:
    """The engines with plugins, if the bundle has any, and what was measured of them."""
    if entry.plugins is None:
        return {}
    return {
        "engines with plugins": "\n".join(entry.plugins.parts) or "slower, removed",
        **{f"plugins parity: {figure}": value for figure, value in entry.plugins.parity.items()},
        **{
            f"measured on {gpu}": f"{found.plain:.4g} ms without plugins, {found.plugins:.4g} with"
            f" ({'faster' if found.faster else 'not used'})"
            for gpu, found in entry.plugins.measured.items()
        },
    }


def _value() -> Column:
    """A column that breaks long hashes and paths rather than cut them."""
    return Column("value", overflow="fold")


def _profiles(entry: ComponentEntry) -> str:
    """A line per profile: each dimension's smallest, best and largest value."""
    lines = [
        ", ".join(f"{name} {'/'.join(map(str, bounds))}" for name, bounds in profile.items())
        for profile in entry.profiles
    ]
    return "\n".join(lines) or "any"


def _size(sizes: list[list[int]], index: int) -> str:
    return "x".join(map(str, sizes[index])) if sizes else "none"


def _text(value: Any) -> str:
    """Names and values on lines of their own; numbers short; lists separated by commas."""
    if isinstance(value, dict):
        return "\n".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(inner) for inner in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
