"""Does the tiny checkpoint draw what held-out captions ask for? Generate, read back, count.

    python -m benchmarks.score_tiny --resolution 256 --captions 200
    python -m benchmarks.score_tiny --resolution 1024 --captions 50
    python -m benchmarks.score_tiny --resolution 256 --pipeline bundle --bundle out/tiny-256

Captions come from the side of the split that training never sees, phrasing and all. At 1024 the
sizes cycle through eight aspect ratios. The result is one JSON file with its provenance, and on
request a contact sheet.
"""

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.provenance import write_result
from examples.tiny.scenes import Scene, caption, random_scene
from examples.tiny.scorer import Score, score
from pixart_rt.checkpoints.sampling_defaults import read_sampling

ASSETS = Path("pixart_rt/assets/tiny")
SIZES = {  # (height, width) from the bucket tables, by resolution
    128: [(128, 128)],
    256: [(256, 256)],
    512: [(512, 512), (416, 608), (608, 416), (352, 704), (704, 352), (384, 672)],
    1024: [
        (1024, 1024),
        (832, 1216),
        (1216, 832),
        (704, 1408),
        (1408, 704),
        (768, 1344),
        (896, 1152),
        (512, 2048),
    ],
}
Generate = Callable[[list[str], int, int, int], list[np.ndarray]]  # prompts, height, width, seed


@dataclass(frozen=True, slots=True)
class Trial:
    """One caption, its image and what was found in it."""

    text: str
    scene: Scene
    image: np.ndarray
    score: Score


def diffusers_generator(args: argparse.Namespace) -> Generate:
    """Images from PixArtAlphaPipeline, the reference."""
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    parts = {}
    if args.resolution <= 256 and not args.multiscale:
        parts["transformer"] = PixArtTransformer2DModel.from_pretrained(
            args.assets, subfolder="transformer_256"
        )
    pipeline = PixArtAlphaPipeline.from_pretrained(args.assets, **parts).to(args.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], height: int, width: int, seed: int) -> list[np.ndarray]:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            return list(
                pipeline(
                    prompts,
                    height=height,
                    width=width,
                    num_inference_steps=args.steps,
                    guidance_scale=args.guidance,
                    generator=[
                        torch.Generator().manual_seed(seed + i) for i in range(len(prompts))
                    ],
                    use_resolution_binning=False,
                    clean_caption=False,
                    output_type="np",
                ).images
            )

    return generate


def bundle_generator(args: argparse.Namespace) -> Generate:
    """Images from this project's own pipeline over a built bundle."""
    from pixart_rt.inference.pipeline import PixArtPipeline

    pipeline = PixArtPipeline.from_bundle(args.bundle)

    def generate(prompts: list[str], height: int, width: int, seed: int) -> list[np.ndarray]:
        images = pipeline(
            prompts,
            height=height,
            width=width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            seed=[seed + i for i in range(len(prompts))],
        ).images
        return [np.asarray(image, np.float32) / 255 for image in images]

    return generate


def run_trials(generate: Generate, args: argparse.Namespace) -> list[Trial]:
    """Every caption once; batches share a size."""
    rng = np.random.default_rng(args.seed)
    asked = []
    for index in range(args.captions):
        scene = random_scene(rng, held_out=True)
        size = SIZES[args.resolution][index % len(SIZES[args.resolution])]
        asked.append((size, scene, caption(scene, rng)))
    asked.sort(key=lambda entry: entry[0])
    trials: list[Trial] = []
    while len(trials) < len(asked):
        start = len(trials)
        size = asked[start][0]
        batch = [entry for entry in asked[start : start + args.batch] if entry[0] == size]
        images = generate([text for _, _, text in batch], *size, args.seed + start)
        for (_, scene, text), image in zip(batch, images, strict=True):
            trials.append(Trial(text, scene, image, score(image, scene)))
        print(f"{len(trials)}/{len(asked)} {summary(trials)['objects_right']:.3f}", file=sys.stderr)
    return trials


def summary(trials: list[Trial]) -> dict[str, object]:
    """Shares over objects (colour and shape; and also at their place) and over images."""

    def share(chosen: list[Trial]) -> float:
        return sum(t.score.right for t in chosen) / sum(t.score.asked for t in chosen)

    sizes = sorted({trial.image.shape[:2] for trial in trials})
    counts = sorted({trial.score.asked for trial in trials})
    objects = sum(trial.score.asked for trial in trials)
    return {
        "captions": len(trials),
        "objects": objects,
        "objects_right": share(trials),
        "objects_right_and_placed": sum(t.score.placed for t in trials) / objects,
        "images_exact": float(np.mean([t.score.exact for t in trials])),
        "backgrounds_right": float(np.mean([t.score.background for t in trials])),
        "objects_right_by_count": {
            str(n): share([t for t in trials if t.score.asked == n]) for n in counts
        },
        "objects_right_by_size": {
            f"{h}x{w}": share([t for t in trials if t.image.shape[:2] == (h, w)]) for h, w in sizes
        },
    }


def contact_sheet(trials: list[Trial], columns: int, cell: int = 192) -> Image.Image:
    """The images in a grid, each caption below its image."""
    rows = -(-len(trials) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12), rows * (cell + 62)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        picture = Image.fromarray((trial.image * 255).round().clip(0, 255).astype(np.uint8))
        picture.thumbnail((cell, cell))
        left, top = index % columns * (cell + 12) + 6, index // columns * (cell + 62) + 6
        corner = (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
        sheet.paste(picture, corner)
        x, y = corner
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="#bbbbbb")
        text = "\n".join(textwrap.wrap(trial.text, 32))
        pen.multiline_text((left, top + cell + 4), text, fill="black", spacing=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", choices=["diffusers", "bundle"], default="diffusers")
    parser.add_argument("--bundle", type=Path, help="folder of a built bundle")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--multiscale", action="store_true", help="1024-MS below 512 pixels too")
    parser.add_argument("--resolution", type=int, choices=SIZES, default=256)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the model's own, else 4.5")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; else float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="name under benchmarks/results, without .json")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write")
    parser.add_argument("--sheet-images", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.guidance is None:
        _, stated = read_sampling(args.assets, "tiny", None)
        args.guidance = 4.5 if stated.guidance_scale is None else stated.guidance_scale
    make = {"diffusers": diffusers_generator, "bundle": bundle_generator}[args.pipeline]
    start = time.monotonic()
    trials = run_trials(make(args), args)
    settings = ("resolution", "seed", "pipeline", "guidance", "steps", "bf16", "threads")
    result = {name: getattr(args, name) for name in settings} | summary(trials)
    result["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(result, indent=1))
    if args.out:
        write_result(args.out, result)
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(trials[: args.sheet_images], columns=6).save(args.sheet)


if __name__ == "__main__":
    main()
