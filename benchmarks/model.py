"""One step of PixArt XL/2, forward, in six forms that have the same weights and inputs.

    python -m benchmarks.model                        writes benchmarks/results/model.json
    python -m benchmarks.model --res 256 --batch 2 32 --forms "diffusers,ours fused" --json OUT

The forms: diffusers eager; diffusers through torch.compile(mode="max-autotune", fullgraph=True);
our model with the reference operators, compiled the same; with the fused operators, eager, as one
CUDA graph, and that with the blocks' linears in fp8. bfloat16, random weights, latents and text;
half the prompts have 30 tokens, the others 120. What is the same at every step is not left out
here: each form does a whole forward. (`benchmarks.loop` times the loop that leaves it out.) A batch
of 2 is one image with guidance.

Every form's output is first compared with our reference model's in float32. A form that differs by
more than its dtype's rounding (`TOLERANCE`) is listed without a time, and the exit code is 1. A row
names the kernels that the self-test refused: in their place PyTorch's operators ran. Without a GPU
a two-block model is run once, to try the script: nothing is measured then.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import result_file
from benchmarks.rows import Rows, kernels_tested
from benchmarks.weights import diffusers_model, random_state
from pixart_rt.bench.gpu_lock import alone, compiler_waits
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.bench.roofline import ceilings
from pixart_rt.bench.timing import in_a_row, seconds_per_call, start_afresh
from pixart_rt.config import RANDOM_XL, XL_2_256, Kernels, ModelConfig, Quality
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.model.transformer import PixArtTransformer

RESOLUTIONS = (256, 512, 1024)
TEXT_TOKENS = 120
SHORT_PROMPT = 30
DTYPE = torch.bfloat16
SEED = 0
CHECKED = 2  # rows of the comparison
# ||output - float32 reference|| / ||reference||. 28 blocks of random weights come to 1.4e-2 in
# bfloat16 on a CPU (288 wide); without a block, the mask or the positions it is above 0.2. In fp8
# it has not been seen yet.
TOLERANCE = {"bf16": 5e-2, "fp8": 1.5e-1}
COMPILED = ("diffusers compiled", "ours reference compiled")
FORMS = ("diffusers", "diffusers compiled", "ours reference compiled", "ours fused",
         "ours fused in one graph", "ours fused fp8 in one graph")  # fmt: skip
Inputs = dict[str, Any]


def config_of(resolution: int, small: bool) -> ModelConfig:
    """The published model of a resolution, whose positions no form computes anew at every step."""
    config = replace(RANDOM_XL.get(resolution, XL_2_256), micro_conditioning=False)
    return replace(config, num_layers=2, num_heads=2, caption_channels=64) if small else config


def inputs_for(config: ModelConfig, side: int, batch: int, device: torch.device) -> Inputs:
    """What both models take, for `batch` images of side × side tokens; half the prompts short."""
    random = torch.Generator().manual_seed(side)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, DTYPE)

    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=device)
    mask[::2, SHORT_PROMPT:] = False
    return {
        "latents": normal(batch, 4, 2 * side, 2 * side),
        "text": normal(batch, TEXT_TOKENS, config.caption_channels),
        "mask": mask,
        "timestep": torch.randint(0, 1000, (batch,), generator=random).to(device),
        "positions": position_table(config, (side, side)).to(device),
    }


class Peer:
    """diffusers' model."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor], inputs: Inputs) -> None:
        model = diffusers_model(config, state)
        self.model = model.to(inputs["latents"].device, DTYPE).eval()
        self.inputs, self.mask = inputs, inputs["mask"].to(DTYPE)

    def step(self, latents: Tensor) -> Tensor:
        given = self.inputs
        output = self.model(
            latents,
            encoder_hidden_states=given["text"],
            encoder_attention_mask=self.mask,
            timestep=given["timestep"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        assert isinstance(output, Tensor)
        return output

    def output(self) -> Tensor:
        """[B, 2C, h, w]."""
        return self.step(self.inputs["latents"])


class Ours:
    """Our model; the modulation of all steps is made once a request, and so outside the step."""

    def __init__(
        self, config: ModelConfig, state: dict[str, Tensor], inputs: Inputs,
        kernels: Kernels, dtype: torch.dtype = DTYPE, quality: Quality = Quality.HIGH,
    ) -> None:  # fmt: skip
        with torch.device("meta"):
            model = PixArtTransformer(config)
        model.load_state_dict(state, assign=True)
        model = model.to(inputs["latents"].device).eval()
        with torch.no_grad():
            self.modulation = model.modulator(inputs["timestep"].float())
        self.model = model.to(dtype).use(kernels, quality)
        self.config, self.inputs, self.dtype = config, inputs, dtype

    def step(self, tokens: Tensor) -> Tensor:
        given = self.inputs
        output = self.model(
            tokens, given["positions"], self.modulation, given["text"].to(self.dtype), given["mask"]
        )
        assert isinstance(output, Tensor)
        return output

    def tokens(self) -> Tensor:
        return patchify(self.inputs["latents"].to(self.dtype), self.config.patch_size)

    def output(self) -> Tensor:
        """[B, 2C, h, w]."""
        side = self.inputs["latents"].shape[-1] // self.config.patch_size
        return unpatchify(self.step(self.tokens()), (side, side), self.config.patch_size)


def make(form: str, config: ModelConfig, state: dict[str, Tensor], inputs: Inputs) -> Peer | Ours:
    """The model of a form, compiled if the form is."""
    made: Peer | Ours
    if form.startswith("diffusers"):
        made = Peer(config, state, inputs)
    else:
        kernels = Kernels.FUSED if "fused" in form else Kernels.REFERENCE
        quality = Quality.FAST if "fp8" in form else Quality.HIGH
        made = Ours(config, state, inputs, kernels, quality=quality)
    if form in COMPILED:
        made.model.compile(mode="max-autotune", fullgraph=True)
    return made


def measure(
    form: str, config: ModelConfig, state: dict[str, Tensor], inputs: Inputs, expected: Tensor
) -> dict[str, Any]:
    """One row: the comparison and, where it holds, the time."""
    made = make(form, config, state, inputs)
    with torch.no_grad():
        first = made.output()[: len(expected)]
        error = float((first.float() - expected).norm() / expected.norm())
        tolerance = TOLERANCE["fp8" if "fp8" in form else "bf16"]
        row: dict[str, Any] = {"error": error, "agrees": error <= tolerance}
        if not row["agrees"]:
            return row
        given = made.inputs["latents"] if isinstance(made, Peer) else made.tokens()
        with alone():
            for _ in range(3):  # of a compiled form: record its graph, settle
                made.step(given)
            sets = in_a_row(made.step, (given,))
            row["seconds"] = seconds_per_call(made.step, sets, graph="one graph" in form)
    return row


def run(args: argparse.Namespace, device: torch.device, save: ResultFile) -> Rows:
    cuda = device.type == "cuda"
    if any("fused" in form for form in args.forms):
        kernels_tested(device, DTYPE)
    values = {"measured": cuda, "dtype": "bfloat16", "tolerance": TOLERANCE,
              "ceilings": ceilings(device)}  # fmt: skip
    rows = Rows(save, _told, values=values, minutes=args.minutes)
    for resolution in args.res or (RESOLUTIONS if cuda else (64,)):
        config = config_of(resolution, small=not cuda)
        state = random_state(config, SEED, device)
        for batch in args.batch:
            inputs = inputs_for(config, resolution // 16, batch, device)
            few = {k: v if k == "positions" else v[:CHECKED] for k, v in inputs.items()}
            reference = Ours(config, state, few, Kernels.REFERENCE, torch.float32)
            with torch.no_grad():
                expected = reference.output()
            del reference
            for form in args.forms:
                row = {"pixels": resolution, "batch": batch, "form": form, "error": None}
                if not cuda and "fused" in form:
                    rows.leave_out(row, "no GPU")
                    continue
                rows.add(row, partial(measure, form, config, state, inputs, expected))
                start_afresh()
    return rows


def _told(row: dict[str, Any]) -> str:
    start = f"{row['pixels']:5} x{row['batch']:<3} {row['form']:28}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    start += f" error {row['error']:.1e}"
    if not row["agrees"]:
        return f"{start}: differs from the reference, not timed"
    return f"{start} {1e3 * row['seconds']:9.3f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--res", type=int, nargs="+", help="pixels a side; default 256 512 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="rows; default 2")
    parser.add_argument("--forms", default=",".join(FORMS), help="comma list; default all")
    parser.add_argument("--minutes", type=float, default=20, help="start nothing after this")
    args = parser.parse_args()
    args.forms = args.forms.split(",")
    if unknown := sorted(set(args.forms) - set(FORMS)):
        parser.error(f"--forms {unknown[0]} is not one of {', '.join(FORMS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save = result_file(args.json, "model", measured=device.type == "cuda")
    compiler_waits()
    return run(args, device, save).end()


if __name__ == "__main__":
    raise SystemExit(main())
