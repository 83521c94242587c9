"""The Typer application: the verbs, in the order a user meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from pixart_rt.cli.bench import bench
from pixart_rt.cli.build import build
from pixart_rt.cli.convert import convert
from pixart_rt.cli.data import data
from pixart_rt.cli.doctor import doctor
from pixart_rt.cli.failures import Verb
from pixart_rt.cli.fidelity import fidelity
from pixart_rt.cli.finetune import finetune
from pixart_rt.cli.generate import generate
from pixart_rt.cli.inspect import inspect
from pixart_rt.cli.merge import merge
from pixart_rt.cli.plan import plan
from pixart_rt.cli.reparameterize import reparameterize
from pixart_rt.cli.train import train
from pixart_rt.cli.tune import tune
from pixart_rt.cli.verify import verify
from pixart_rt.version import __version__

app = typer.Typer(
    rich_markup_mode=None,  # plain help keeps the examples' lines as they are written
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,  # taken out by `main`, which knows it at any place of the line
) -> None:
    """Build engines from PixArt checkpoints and generate images with them.

    \b
    Examples:
      pixart-rt build --model tiny --res 1024
      pixart-rt generate "a red circle above a blue square" --bundle engines/tiny-1024 -o out.png
      pixart-rt doctor
    """


for verb in (
    build, generate, fidelity, plan, convert, train, reparameterize, merge, inspect, verify, bench,
    tune, doctor,
):  # fmt: skip
    app.command(cls=Verb)(verb)
app.add_typer(data)
app.add_typer(finetune)
