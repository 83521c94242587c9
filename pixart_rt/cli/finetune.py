"""`pixart-rt finetune`: pictures into a LoRA or all weights, an LCM student, a ControlNet."""

from __future__ import annotations

import typer

from pixart_rt.cli.failures import Verb
from pixart_rt.cli.finetune_controlnet import controlnet
from pixart_rt.cli.finetune_lcm import lcm
from pixart_rt.cli.finetune_pictures import dreambooth, lora

finetune = typer.Typer(
    name="finetune",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Adapt a model to pictures.\n\n\b\nExamples:\n"
    '  pixart-rt finetune lora dog/ --model tiny --prompt "a photo of sks dog" --out dog-lora\n'
    '  pixart-rt finetune dreambooth dog/ --prompt "a photo of sks dog" --out dog-model',
)
for verb in (lora, dreambooth, lcm, controlnet):
    finetune.command(cls=Verb)(verb)
