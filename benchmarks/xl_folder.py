"""Writes a pipeline of the published 1024 px size, T5-XXL and VAE included, with random weights.

    python -m benchmarks.xl_folder OUT             11 GB, bfloat16, in diffusers' layout
    python -m benchmarks.xl_folder OUT --small     the same with few and narrow layers, to try it

For `pixart-rt build --model OUT` and `pixart-rt bench`: speed does not depend on what weights say.
The tokenizer is the tiny model's: a prompt has a token for each of its letters or words.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

import pixart_rt
from pixart_rt.checkpoints.configs import config_to_json
from pixart_rt.config import XL_2_1024_MS
from pixart_rt.files import replacing
from pixart_rt.model.text_encoder import T5_XXL
from pixart_rt.model.vae import SD_VAE

TINY = Path(pixart_rt.__file__).parent / "assets" / "tiny"
SMALL_T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32}


def transformer(small: bool) -> PixArtTransformer2DModel:
    values = {k: v for k, v in config_to_json(XL_2_1024_MS).items() if not k.startswith("_")}
    if small:
        values |= {"num_layers": 2, "num_attention_heads": 2, "caption_channels": 64,
                   "cross_attention_dim": 2 * XL_2_1024_MS.head_dim}  # fmt: skip
    return PixArtTransformer2DModel(**values)


def text_encoder(small: bool) -> T5EncoderModel:
    shape = asdict(T5_XXL) | (SMALL_T5 if small else {})
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **shape))


def vae(small: bool) -> AutoencoderKL:
    channels = {"block_out_channels": [32, 32, 32, 32]} if small else {}
    return AutoencoderKL.from_config(SD_VAE | channels)


def write(out: Path, small: bool) -> None:
    """Each component is made on the GPU, if there is one, and saved in bfloat16."""
    out.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "transformer": transformer, "text_encoder": text_encoder, "vae": vae
    }  # fmt: skip
    for name, make in makers.items():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                module = make(small)
        finally:
            torch.set_default_dtype(torch.float32)
        module.to(torch.bfloat16).save_pretrained(out / name)
        del module
    DPMSolverMultistepScheduler.from_pretrained(TINY / "scheduler").save_pretrained(
        out / "scheduler"
    )
    shutil.copytree(TINY / "tokenizer", out / "tokenizer")
    shutil.copy(TINY / "model_index.json", out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    with replacing(args.out) as new:
        write(new, args.small)
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
