"""`pixart-rt merge`: a LoRA adapter into the weights of the model it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli.console import Steps, note, print_json
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
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Also into other weights than it was trained on.")
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
    check_model(out, (PIPELINE, TRANSFORMER), force=force)
    with Steps() as progress:
        progress(f"merging {adapter}", 0, 1)
        from pixart_rt.training.finetune.merge import merge_adapter  # torch

        summary = merge_adapter(
            base, adapter, out, scale=scale, res=res, transformer_only=transformer_only,
            heads=heads, sample_size=sample_size, lcm=lcm, any_base=any_base, force=force,
        )  # fmt: skip
    if as_json:
        print_json(summary)
        return
    for line in summary["kept"]:
        note(f"kept: {line}")
    typer.echo(str(out))
