"""`pixart-rt tune`: measure, on this GPU, kernels' launch configurations or a bundle's plugins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_rt.bundle import MANIFEST
from pixart_rt.cli.console import note
from pixart_rt.config import Precision
from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.files import check_file, replacing


def tune(
    precision: Annotated[
        Precision, typer.Option(help="Of the model that will be run: fp16 or bf16.")
    ] = Precision.BF16,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the table goes. Default: the user's cache, where it is found."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.0, help="Begin nothing after this. Default: measure everything."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Measure this bundle's engines with and without plugins instead, and note in its "
            "manifest which is faster here.",
        ),
    ] = None,
) -> None:
    """Find the fastest configuration of every kernel, and the fastest implementation where there
    are several, on this GPU.

    Takes minutes. From then on the fused operators of every model on a GPU of this name use the
    table. Prints its path.

    \b
    Examples:
      pixart-rt tune
      pixart-rt tune --precision fp16 --out tuned.json
      pixart-rt tune --bundle engines/alpha-1024
    """
    if bundle is not None:
        if out is not None:
            raise ConfigError(
                "--out is not supported with --bundle, whose result goes into the bundle"
            )
        check_file(bundle / MANIFEST, force=True)
        _tune_bundle(bundle)
        return
    if precision is Precision.FP32:
        raise ConfigError("--precision fp32 was requested; tuning is for fp16 and bf16")
    import torch

    from pixart_rt.kernels.catalog import FP8, MODEL, self_test
    from pixart_rt.kernels.launch import forget_tables, user_table_path
    from pixart_rt.kernels.tuning import merged
    from pixart_rt.kernels.tuning import tune as measure

    if not torch.cuda.is_available():
        raise BackendError(
            "tuning was requested, but this machine has no CUDA GPU; run it on the one that will "
            "serve"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    path = out or user_table_path(torch.cuda.get_device_name(device))
    check_file(path, force=True)  # of its own kind, which _table_at sees to
    _table_at(path)
    # Each kernel agrees with its reference first; one that does not is not tuned, and a warning
    # says so.
    self_test(device, dtype, (*MODEL, *FP8), training=True)
    seconds = float("inf") if minutes is None else 60 * minutes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table = measure(device, dtype, report=note, seconds=seconds, workers=cores or 1)
    older = _table_at(path)
    if older is not None:  # entries of the other precision, and of shapes not measured now, stay
        table = merged(older, table)
    with replacing(path) as new:
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    forget_tables()
    if table["not_tried"]:
        note(f"{len(table['not_tried'])} shapes were not tried in {minutes} minutes")
    print(path)


def _table_at(path: Path) -> dict[str, Any] | None:
    """The table that is there already. ConfigError for a file that is none, which is not ours."""
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(table["operators"], dict):
            return dict(table)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} exists and is no table of `pixart-rt tune`; choose another --out")


def _tune_bundle(bundle: Path) -> None:
    """Measure a bundle's plugins here; one line a component, and which of its engines will run."""
    from pixart_rt.export.plugin_choice import choose_in_bundle

    for name, found in choose_in_bundle(bundle).items():
        chosen = "with plugins" if found.faster else "without plugins"
        wrong = "" if found.right else f", wrong with plugins ({found.difference})"
        note(
            f"{name}: {found.plain:.4g} ms without plugins, {found.plugins:.4g} ms with{wrong}; "
            f"it will run {chosen}"
        )
    print(bundle)
