"""`pixart-rt reparameterize`: a class-conditional DiT to the text model that starts as it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.config import CfgNull
from pixart_rt.files import TRANSFORMER, check_model
from pixart_rt.training.reparameterize_settings import TBlock, TextStart

DEFAULT = TextStart()


class Which(StrEnum):
    """The weights of a file of DiT's train.py, which may hold both."""

    EMA = "ema"
    MODEL = "model"


def reparameterize(
    src: Annotated[Path, typer.Argument(metavar="DIT", help="A DiT checkpoint, .pt.")],
    dst: Annotated[Path, typer.Argument(metavar="OUT", help="The folder or .pth to write.")],
    t: Annotated[
        float, typer.Option("--t", help="The timestep at which the text model is the DiT.")
    ] = DEFAULT.t,
    t_block: Annotated[
        TBlock, typer.Option(help="The start of the modulation that all blocks share.")
    ] = DEFAULT.t_block,
    sample_size: Annotated[
        int | None, typer.Option(help="Latent pixels per side: resolution / 8. Default: the DiT's.")
    ] = None,
    interpolation_scale: Annotated[
        float | None,
        typer.Option(help="Divides positions. Default: sample size over the DiT's (DiffFit)."),
    ] = None,
    caption_channels: Annotated[
        int, typer.Option(help="Width of the text encoder.")
    ] = DEFAULT.caption_channels,
    max_text_tokens: Annotated[int, typer.Option(help="Prompt length.")] = DEFAULT.max_text_tokens,
    cfg_null: Annotated[
        CfgNull, typer.Option(help="What dropped captions and unconditional guidance see.")
    ] = DEFAULT.cfg_null,
    seed: Annotated[int, typer.Option(help="Draws the weights that the DiT has not.")] = 0,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of the DiT. Default: 16, as DiT-XL.")
    ] = None,
    which: Annotated[
        Which | None, typer.Option(help="The weights of a DiT training run. Default: ema.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Start a text model from a class-conditional DiT.

    At the timestep of --t every block computes what it computes in the DiT without class, and text
    has no influence yet. OUT is a diffusers transformer folder, or an original .pth by its suffix.

    \b
    Examples:
      pixart-rt reparameterize DiT-XL-2-256x256.pt transformer/
      pixart-rt reparameterize DiT-XL-2-256x256.pt start.pth --t 500 --t-block block0
      pixart-rt reparameterize DiT-XL-2-256x256.pt transformer-512/ --sample-size 64
      pixart-rt reparameterize dit.pt small/ --heads 6 --caption-channels 128 --max-text-tokens 32
    """
    start = TextStart(
        t=t,
        t_block=t_block,
        sample_size=sample_size,
        interpolation_scale=interpolation_scale,
        caption_channels=caption_channels,
        max_text_tokens=max_text_tokens,
        cfg_null=cfg_null,
        seed=seed,
    )
    check_model(dst, TRANSFORMER, force=force)
    with Steps() as progress:
        progress(f"re-parameterising {src}", 0, 1)
        from pixart_rt.training.reparameterize import reparameterize_file  # torch

        summary = reparameterize_file(
            src, dst, start, heads=heads, which=None if which is None else which.value, force=force
        )
    if as_json:
        print_json(summary)
        return
    for name in ("kept", "dropped"):
        for line in summary[name]:
            note(f"{name}: {line}")
    typer.echo(str(dst))
