"""`pixart-rt merge`: a LoRA adapter into the weights of the model it was trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.config import Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.files import PIPELINE, TRANSFORMER, check_model


def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="tiny, a diffusers folder, a .pth or a hub id.")
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A LoRA's folder, as peft writes it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder or .pth to write.")],
    scale: Annotated[float, typer.Option(help="How much of the adapter; 1 is all of it.")] = 1.0,
    res: Annotated[
        int | None, typer.Option(help="256: tiny's model for that. Others have one transformer.")
    ] = None,
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="Leave the pipeline's other parts out.")
    ] = False,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of a .pth. Default: 16, as published.")
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Latent pixels per side of a .pth: resolution / 8.")
    ] = None,
    lcm: Annotated[
        bool,
        typer.Option("--lcm", help="The adapter is an LCM-LoRA that does not say so itself."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Merge a LoRA adapter into a model's weights.

    OUT is what BASE is, a pipeline folder or a transformer folder, or a .pth by its suffix; its
    weights are float32. An origin.json names the base, the adapter's SHA-256 and the scale. An
    LCM-LoRA of `pixart-rt finetune lcm` makes LCM's the pipeline's scheduler, as --lcm does.

    \b
    Examples:
      pixart-rt merge PixArt-alpha/PixArt-XL-2-1024-MS dog-lora/ dog/
      pixart-rt merge tiny style-lora/ styled/ --res 256 --scale 0.7
      pixart-rt merge transformer/ style-lora/ styled.pth
    """
    if not math.isfinite(scale):
        raise ConfigError(f"--scale {scale} was asked; give a number such as 1 or 0.7")
    check_model(out, (PIPELINE, TRANSFORMER), force=force)
    with Steps() as progress:
        progress(f"merging {adapter}", 0, 1)
        summary = _merge(
            base, adapter, out, scale, res, transformer_only, heads, sample_size, lcm, force
        )
    if as_json:
        print_json(summary)
        return
    for line in summary["kept"]:
        note(f"kept: {line}")
    typer.echo(str(out))


def _merge(
    base: str,
    adapter: Path,
    out: Path,
    scale: float,
    res: int | None,
    transformer_only: bool,
    heads: int | None,
    sample_size: int | None,
    lcm: bool,
    force: bool,
) -> dict[str, Any]:
    """Read both, then write; nothing is written before everything fits."""
    from pixart_rt.checkpoints import lora as adapters
    from pixart_rt.checkpoints import pipeline_folder
    from pixart_rt.checkpoints.hub import locate, transformer_path
    from pixart_rt.checkpoints.transformer import read_transformer
    from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler

    found = adapters.read_adapter(adapter)
    if lcm:
        found = replace(found, scheduler=Scheduler.LCM)
    whole = not transformer_only and out.suffix != ".pth"
    folder = locate(base, pipeline_folder.COMPONENTS if whole else ["transformer"])
    pipeline = folder if whole and pipeline_folder.is_pipeline(folder) else None
    check_model(out, TRANSFORMER if pipeline is None else PIPELINE, force=force)
    path = transformer_path(folder, base, res)
    checkpoint = read_transformer(path, heads=heads, sample_size=sample_size)
    if res is not None and checkpoint.config.resolution != res:
        raise ConfigError(
            f"--res {res} was asked, but {base} is a {checkpoint.config.resolution} px model"
        )
    merged = adapters.merge(checkpoint, found, scale)
    distilled = found.scheduler is Scheduler.LCM
    if distilled and pipeline is None:
        note(f"{out} will hold no scheduler: sample it with lcm, without guidance")
    summary = pipeline_folder.write_model(
        merged,
        out,
        pipeline=pipeline,
        finish=use_lcm_scheduler if distilled else lambda _: None,
        force=force,
    )
    return summary | {"origin": merged.origin}
