"""`pixart-rt fidelity`: how far approximate settings move a bundle's images."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pixart_rt.approximations import FirstBlockCache, StepCache
from pixart_rt.bundle import Manifest
from pixart_rt.cli.console import Steps, print_tables
from pixart_rt.cli.prompts_file import read_prompts
from pixart_rt.config import SamplingConfig, Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.files import check_file, replacing
from pixart_rt.version import __version__

if TYPE_CHECKING:
    from pixart_rt.evaluation.fidelity import Judged, Variant

Thresholds = Annotated[
    list[float] | None, typer.Option(help="A threshold; repeat it to compare several.")
]


def fidelity(
    bundle: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `pixart-rt build` made.")
    ],
    step_cache: Thresholds = None,
    first_block_cache: Thresholds = None,
    guidance_stop: Annotated[
        list[float] | None, typer.Option(help="The part of the steps that is guided; repeatable.")
    ] = None,
    fewer_steps: Annotated[
        list[int] | None, typer.Option(help="Exact with so many steps, to compare; repeatable.")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR:SAMPLER:STEPS", help="A few-step bundle; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the exact image.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. Default: that of `generate`.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image k draws from seed + k.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line. Default: eight fixed ones.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write all as JSON here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --json.")] = False,
) -> None:
    """Compare approximate settings with the exact image.

    For every prompt the exact image and that of each setting are made from the same seed, one at a
    time. The table says how many steps were skipped or ran without guidance, and how like the
    images are: PSNR in dB over all of them, SSIM as their mean, each with its worst image.

    \b
    Examples:
      pixart-rt fidelity engines/tiny-256 --step-cache 0.1 --step-cache 0.2
      pixart-rt fidelity engines/tiny-256 --guidance-stop 0.5 --json out.json
      pixart-rt fidelity engines/alpha-512 --student engines/dmd-512:dmd:1
    """
    names = _settings(step_cache, first_block_cache, guidance_stop, fewer_steps, steps)
    students = [_student(text) for text in student or []]
    texts = None if prompts is None else read_prompts(prompts)
    if not names and not students:
        raise ConfigError("no setting was requested to compare; give one, such as --step-cache 0.1")
    if json_out is not None:
        check_file(json_out, force=force)
    manifest = Manifest.read(bundle)
    with Steps() as progress:
        progress(f"loading {bundle}", 0, 1)
        from pixart_rt.evaluation.fidelity import PROMPTS, Variant, judge
        from pixart_rt.inference.pipeline import (
            PixArtPipeline,  # torch, diffusers: seconds to import
        )

        variants = [Variant(name=name, **values) for name, values in names]
        variants += [_loaded(*each) for each in students]
        judged = judge(
            PixArtPipeline.from_bundle(bundle),
            variants,
            prompts=texts or PROMPTS,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            progress=progress,
        )
    if json_out is not None:
        settings = {"steps": steps, "guidance_scale": guidance, "seed": seed,
                    "scheduler": manifest.scheduler}  # fmt: skip
        document = {**_origin(bundle, manifest), "exact": settings,
                    "results": [each.to_dict() for each in judged]}  # fmt: skip
        with replacing(json_out) as new:
            new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_tables(_table(judged))


def _settings(
    step_cache: list[float] | None,
    first_block_cache: list[float] | None,
    guidance_stop: list[float] | None,
    fewer_steps: list[int] | None,
    steps: int,
) -> list[tuple[str, dict[str, Any]]]:
    """What was requested, checked before anything is loaded."""
    SamplingConfig(num_inference_steps=steps)
    found: list[tuple[str, dict[str, Any]]] = []
    caches = [StepCache(each) for each in step_cache or []]
    blocks = [FirstBlockCache(each) for each in first_block_cache or []]
    for approximate in (*caches, *blocks):
        found.append((str(approximate), {"approximate": approximate}))
    for stop in guidance_stop or []:
        SamplingConfig(guidance_interval=(0.0, stop))
        found.append((f"guidance-stop {stop:g}", {"guidance_stop": stop}))
    for count in fewer_steps or []:
        SamplingConfig(num_inference_steps=count)
        found.append((f"{count} steps", {"num_inference_steps": count}))
    return found


def _student(text: str) -> tuple[Path, Scheduler, int]:
    folder, _, rest = text.partition(":")
    name, _, steps = rest.partition(":")
    try:
        sampler, count = Scheduler(name), int(steps)
    except ValueError as error:
        raise ConfigError(
            f"--student {text!r} is not supported; write DIR:SAMPLER:STEPS, such as "
            "engines/dmd-512:dmd:1"
        ) from error
    SamplingConfig(num_inference_steps=count, scheduler=sampler)
    return Path(folder), sampler, count


def _loaded(folder: Path, sampler: Scheduler, steps: int) -> Variant:
    from pixart_rt.evaluation.fidelity import Variant
    from pixart_rt.inference.pipeline import PixArtPipeline

    return Variant(
        name=f"{folder.name} {sampler} {steps}",
        student=PixArtPipeline.from_bundle(folder),
        scheduler=sampler,
        num_inference_steps=steps,
    )


def _origin(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """When, how and with what."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["pixart-rt", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "pixart_rt": __version__,
                     "torch": torch.__version__},
        "hardware": {"cores": os.cpu_count(),
                     "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "model": manifest.model["name"],
        "bundle": manifest.key,
        "backend": manifest.components["transformer"].backend,
        "precision": manifest.engine_config["precision"],
        "resolution": manifest.engine_config["resolution"],
    }  # fmt: skip


def _table(judged: list[Judged]) -> Table:
    """Within 80 columns, which is what a pipe gets."""
    table = Table()
    for name in ("setting", "skipped", "unguided", "PSNR", "worst", "SSIM", "worst"):
        table.add_column(name, no_wrap=name == "setting")
    for each in judged:
        table.add_row(
            each.name, f"{each.skipped:.1f}", str(each.unguided),
            f"{each.psnr:.1f}", f"{each.worst_psnr:.1f}", f"{each.ssim:.3f}",
            f"{each.worst_ssim:.3f}",
        )  # fmt: skip
    return table
