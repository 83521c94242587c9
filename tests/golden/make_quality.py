"""Make quality.safetensors: latents of the tiny model at every quality, bfloat16 on the CPU.

    python tests/golden/make_quality.py

Run it again when tiny's 256 px weights change, and look at what changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart_rt.config import EngineConfig, Precision, Quality
from pixart_rt.export.build import build
from pixart_rt.inference.pipeline import PixArtPipeline

GOLDEN = Path(__file__).with_name("quality.safetensors")
PROMPT = "a red circle above a blue square"


def latents_of(quality: Quality, folder: Path) -> torch.Tensor:
    """Four guided steps at 256 px, from a bundle that was built with this quality."""
    config = EngineConfig(
        resolution=256, backend="torch", precision=Precision.BF16, quality=quality
    )
    bundle = build("tiny", folder / quality, config).path
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    assert pipe.quality is quality
    made = pipe(PROMPT, num_inference_steps=4, guidance_scale=3.0, output_type="latent")
    return made.images


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = {q.value: latents_of(q, Path(name)).half().contiguous() for q in Quality}
    save_file(found, GOLDEN)
    high = found["high"].float()
    for quality, latents in found.items():
        distance = (latents.float() - high).norm() / high.norm()
        print(f"{quality:10} {float(distance):.2e} from high")
