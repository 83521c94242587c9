"""Gather the trained parts into one diffusers folder, weights in float16.

    make tiny                                                   # or its steps up to the training
    python -m examples.tiny.export --run runs/tiny/run --out runs/tiny/model

Tokenizer, text encoder and VAE are those under --root, by default the shipped ones: the run was
trained with these. `PixArtAlphaPipeline.from_pretrained(out)` loads the 1024-MS model; the
256-pixel transformer lies next to it in `transformer_256`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from examples.script import run_script
from examples.tiny.scenes import vocabulary
from pixart_rt.checkpoints.hub import TINY, VOCABULARY
from pixart_rt.checkpoints.pipeline_folder import INDEX
from pixart_rt.checkpoints.sampling_defaults import GUIDANCE_SCALE
from pixart_rt.files import PIPELINE, check_folder, replacing_folder

MULTISCALE = "05-aesthetics-1024/transformer-ema"
GUIDANCE = 3.0  # on 24 held-out captions it did better than 4.5 (docs/tiny.md)
SQUARE = "03-aesthetics-256/transformer-ema"


def build_pipeline(
    root: Path, transformer: PixArtTransformer2DModel, vae: AutoencoderKL | None = None
) -> PixArtAlphaPipeline:
    """The parts under `root` around a transformer."""
    return PixArtAlphaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(root / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(root / "text_encoder").eval(),
        vae=vae or AutoencoderKL.from_pretrained(root / "vae").eval(),
        transformer=transformer.eval(),
        scheduler=build_scheduler(),
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of order 2 over DiT's linear betas, PixArt-alpha's sampler."""
    return DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000
    )


def export(root: Path, multiscale: Path, square: Path, out: Path, force: bool) -> int:
    """Write the folder, which may be `root`, and return its size in bytes.

    With `force` one that an earlier export wrote is replaced.
    """
    check_folder(out, PIPELINE, force=force)
    pipeline = build_pipeline(root, PixArtTransformer2DModel.from_pretrained(multiscale))
    with replacing_folder(out, PIPELINE, force=force) as new:
        pipeline.save_pretrained(new)
        state_guidance(new / INDEX)
        PixArtTransformer2DModel.from_pretrained(square).save_pretrained(new / "transformer_256")
        for folder in ("transformer", "transformer_256", "vae", "text_encoder"):
            for path in (new / folder).glob("*.safetensors"):
                halve(path)
            forget_origin(new / folder / "config.json")
        shutil.copy(root / "tokenizer" / "spiece.model", new / "tokenizer" / "spiece.model")
        (new / VOCABULARY).write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def state_guidance(path: Path) -> None:
    """Write the model's own guidance into the pipeline's index, for `pixart-rt build`."""
    index = {**json.loads(path.read_text(encoding="utf-8")), GUIDANCE_SCALE: GUIDANCE}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def halve(path: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(path).items()
    }
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def forget_origin(path: Path) -> None:
    """Drop the folder a config was loaded from: it means nothing to others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=TINY, help="the other parts")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny/run"), help="of recipes/tiny.toml"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/model"))
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(arguments)
    size = export(args.root, args.run / MULTISCALE, args.run / SQUARE, args.out, args.force)
    print(f"{size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    run_script(main)
