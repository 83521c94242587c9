"""One step of PixArt XL/2, forward and forward with backward, in four forms.

    python -m benchmarks.model                        writes benchmarks/results/model.json
    python -m benchmarks.model --json OUT --minutes 5

The forms: diffusers eager; diffusers through torch.compile(mode="max-autotune"); our model with the
reference operators, compiled the same; our model with the fused operators, and that compiled.
bfloat16, random weights, random latents and text. Inference is timed as the form is used: compiled
ones with their own CUDA graphs, eager ones as eager; our fused eager model also as one CUDA graph.
Training is autocast to bfloat16 with float32 weights, and without an optimizer. Forms that the time
limit leaves out are listed as not run. Without a GPU a two-block model is run once, untimed.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from benchmarks.provenance import provenance, write_result
from benchmarks.timing import ceilings, seconds_per_call
from pixart_rt.config import XL_2_1024_MS, Kernels, ModelConfig
from pixart_rt.model.conditioning import position_table
from pixart_rt.model.transformer import PixArtTransformer

RESOLUTIONS = (256, 512, 1024)
TRAINING_BATCH = {256: 64, 512: 32, 1024: 8}
TEXT_TOKENS = 120
SHORT_PROMPT = 30
Inputs = dict[str, Any]


def config_of(small: bool) -> ModelConfig:
    config = replace(XL_2_1024_MS, micro_conditioning=False)
    return replace(config, num_layers=2, num_heads=2, caption_channels=64) if small else config


def diffusers_model(config: ModelConfig) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_layers,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        sample_size=config.sample_size,
        use_additional_conditions=False,
    )


def inputs_for(config: ModelConfig, side: int, batch: int, device: torch.device) -> Inputs:
    """What both models take, for `batch` images of side × side tokens; half the prompts short."""
    random = torch.Generator().manual_seed(side)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    mask = torch.zeros(batch, TEXT_TOKENS, dtype=torch.bool, device=device)
    mask[:, :SHORT_PROMPT] = True
    return {
        "latents": normal(batch, 4, 2 * side, 2 * side),
        "text": normal(batch, TEXT_TOKENS, config.caption_channels),
        "mask": mask,
        "timestep": torch.randint(0, 1000, (batch,), generator=random).to(device),
        "tokens": normal(batch, side * side, config.token_channels),
        "positions": position_table(config, (side, side)).to(device),
        "modulation": normal(batch, 7, config.hidden_size),
    }


def call_diffusers(model: Any, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    return model(
        inputs["latents"].to(dtype),
        encoder_hidden_states=inputs["text"].to(dtype),
        encoder_attention_mask=inputs["mask"].to(dtype),
        timestep=inputs["timestep"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def call_ours(model: Any, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The core: modulation of all steps is made once a request, and so outside the step."""
    return model(
        inputs["tokens"],
        inputs["positions"],
        inputs["modulation"],
        inputs["text"].to(dtype),
        inputs["mask"],
    )


FORMS = ("diffusers", "diffusers compiled", "ours reference compiled", "ours fused",
         "ours fused in one graph", "ours fused compiled")  # fmt: skip


def make(form: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of a form, compiled if the form is. Call with `call_diffusers` or `call_ours`."""
    torch.manual_seed(0)
    with torch.device(device):
        theirs = form.startswith("diffusers")
        model: Any = diffusers_model(config) if theirs else PixArtTransformer(config)
    model = model.to(dtype)
    if not theirs:
        model.use(Kernels.FUSED if "fused" in form else Kernels.REFERENCE)
    if "compiled" in form and device.type == "cuda":
        mode = "max-autotune" if dtype == torch.bfloat16 else "max-autotune-no-cudagraphs"
        model = torch.compile(model, mode=mode, fullgraph=True)
    return model


def forward_seconds(form: str, config: ModelConfig, side: int, device: torch.device) -> float:
    model = make(form, config, device, torch.bfloat16).eval()
    call = call_diffusers if form.startswith("diffusers") else call_ours
    inputs = inputs_for(config, side, 2, device)

    def step(_: Tensor) -> Tensor:
        with torch.no_grad():
            return call(model, inputs, torch.bfloat16)

    if "compiled" in form:
        for _ in range(4):  # compile, record its graph, settle
            step(inputs["latents"])
    return seconds_per_call(step, [(inputs["latents"],)], graph="one graph" in form)


def training_seconds(form: str, config: ModelConfig, side: int, device: torch.device) -> float:
    model = make(form, config, device, torch.float32).train()
    call = call_diffusers if form.startswith("diffusers") else call_ours
    batch = TRAINING_BATCH[16 * side] if device.type == "cuda" else 2
    inputs = inputs_for(config, side, batch, device)

    def step(_: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            output = call(model, inputs, torch.float32)
        output.float().square().mean().backward()

    return seconds_per_call(step, [(inputs["latents"],)], graph=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--minutes", type=float, default=20, help="start nothing after this")
    parser.add_argument("--forms", default=",".join(FORMS), help="comma list")
    parser.add_argument("--only", choices=("forward", "training"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(small=device.type == "cpu")
    sides = [resolution // 16 for resolution in RESOLUTIONS] if device.type == "cuda" else [4]
    started, rows, left_out = time.monotonic(), [], []
    timers: dict[str, Callable[..., float]] = {
        "forward": forward_seconds, "training": training_seconds
    }  # fmt: skip
    for kind, timer in timers.items():
        for side in sides:
            for form in args.forms.split(","):
                if args.only not in (None, kind) or (kind == "training" and "one graph" in form):
                    continue
                if time.monotonic() - started > 60 * args.minutes:
                    left_out.append(f"{kind} {16 * side} {form}")
                    continue
                seconds = timer(form, config, side, device)
                rows.append({"kind": kind, "pixels": 16 * side, "form": form, "seconds": seconds})
                print(f"{kind:9}{16 * side:5}  {form:26}{1e3 * seconds:9.3f} ms", flush=True)
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()
    values = {"measured": device.type == "cuda", "ceilings": ceilings(device), "rows": rows,
              "training_batch": TRAINING_BATCH, "not_run_for_time": left_out}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({**provenance(), **values}, indent=1) + "\n")
    elif device.type == "cuda":
        print(write_result("model", values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
