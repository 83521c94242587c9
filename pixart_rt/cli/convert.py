"""`pixart-rt convert`: an original .pth to a diffusers transformer folder, or the reverse."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.errors import CheckpointError
from pixart_rt.files import TRANSFORMER, check_model


class Which(StrEnum):
    """The weights of a .pth that may hold both."""

    STATE_DICT = "state_dict"
    STATE_DICT_EMA = "state_dict_ema"


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A .pth or a diffusers folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder or .pth to write.")],
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of a .pth. Default: 16, as published.")
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Latent pixels per side of a .pth: resolution / 8.")
    ] = None,
    interpolation_scale: Annotated[
        float | None, typer.Option(help="Of a .pth's position table. Default: by sample size.")
    ] = None,
    which: Annotated[
        Which | None, typer.Option(help="The weights of a .pth to take. Default: state_dict.")
    ] = None,
    max_text_tokens: Annotated[
        int | None, typer.Option(help="Prompt length, where the checkpoint does not say.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Convert a transformer between .pth and diffusers.

    A .pth becomes a diffusers transformer folder, a diffusers folder a .pth. The configuration is
    read from the tensors; what they cannot tell is an option.

    \b
    Examples:
      pixart-rt convert PixArt-XL-2-1024-MS.pth transformer/ --sample-size 128
      pixart-rt convert transformer/ PixArt-XL-2-1024-MS.pth
      pixart-rt convert run.pth transformer/ --sample-size 64 --which state_dict_ema
    """
    if not src.exists():
        raise CheckpointError(f"{src} does not exist; give a .pth file or a diffusers folder")
    check_model(dst, TRANSFORMER, force=force)
    with Steps() as progress:
        progress(f"converting {src}", 0, 1)
        from pixart_rt.checkpoints.transformer import convert as convert_checkpoint  # torch

        summary = convert_checkpoint(
            src,
            dst,
            heads=heads,
            sample_size=sample_size,
            interpolation_scale=interpolation_scale,
            which=None if which is None else which.value,
            max_text_tokens=max_text_tokens,
            force=force,
        )
    _show(summary, dst, as_json)


def _show(summary: dict[str, Any], dst: Path, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    for name in ("kept", "dropped"):
        for line in summary[name]:
            note(f"{name}: {line}")
    typer.echo(str(dst))
