"""Draw scenes, encode them once and keep the latents on disk: <size>.npy beside <size>.json.

    python -m pixart_rt.training.tiny.latents --root runs/tiny 128x128=20000 256x256=16000

Latents are posterior means times `scaling_factor`, float16 [scenes, 4, height / 8, width / 8].
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixart_rt.training.tiny.scenes import Scene, Thing, draw, place, random_scene
from pixart_rt.training.tiny.train_vae import to_tensor

PIXELS_PER_BATCH = 8 * 256 * 256


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, height: int, width: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Scene]]:
    """(latents, scenes) of `count` training scenes at one size."""
    scenes = [random_scene(rng, held_out=False) for _ in range(count)]
    latents = np.empty((count, 4, height // 8, width // 8), np.float16)
    batch = max(PIXELS_PER_BATCH // (height * width), 1)
    for start in range(0, count, batch):
        images = [
            draw(scene, place(scene, height, width, rng), height, width)
            for scene in scenes[start : start + batch]
        ]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_tensor(images)).latent_dist.mean
        latents[start : start + batch] = (mean.float() * vae.config.scaling_factor).half().numpy()
    return latents, scenes


def save_scenes(folder: Path, latents: np.ndarray, scenes: list[Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{latents.shape[2] * 8}x{latents.shape[3] * 8}"
    np.save(folder / f"{name}.npy", latents)
    (folder / f"{name}.json").write_text(json.dumps([asdict(scene) for scene in scenes]))


class LatentStore:
    """Scenes of one size with their latents, the latter mapped from disk."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.latents = np.load(folder / f"{height}x{width}.npy", mmap_mode="r")
        records = json.loads((folder / f"{height}x{width}.json").read_text())
        self.scenes = [
            Scene(tuple(Thing(**t) for t in r["things"]), r["direction"], r["background"])
            for r in records
        ]

    def sample(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, list[Scene]]:
        """(latents [batch, 4, h, w] float32, their scenes)."""
        chosen = np.sort(rng.integers(len(self.scenes), size=batch))
        latents = torch.from_numpy(self.latents[chosen].astype(np.float32))
        return latents, [self.scenes[index] for index in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="+", help="height x width = scenes, e.g. 256x256=20000")
    parser.add_argument("--root", type=Path, default=Path("runs/tiny"), help="has vae/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = (
        AutoencoderKL.from_pretrained(args.root / "vae")
        .eval()
        .to(memory_format=torch.channels_last)
    )
    for wish in args.sizes:
        size, _, count = wish.partition("=")
        height, width = map(int, size.split("x"))
        rng = np.random.default_rng([args.seed, height, width])
        save_scenes(args.root / "latents", *encode_scenes(vae, height, width, int(count), rng))
        print(f"{count} scenes of {size}", flush=True)


if __name__ == "__main__":
    main()
