"""A contact sheet of what a tiny bundle draws: several prompts, several shapes of image.

    python examples/contact_sheet.py --bundle engines/tiny-1024 --output demo/contact-sheet.png

The prompts are in the small language that the embedded model was trained on (docs/tiny.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pixart_rt import PixArtError, PixArtPipeline, Request
from pixart_rt.inference.images import contact_sheet, write_png

SCENES = (  # prompt, aspect ratio as width:height
    ("a red circle above a blue square", "1:1"),
    ("a green triangle to the left of a yellow star", "3:2"),
    ("a large purple star on a black background", "1:1"),
    ("an orange square, a blue circle and a red triangle in a row", "2:1"),
    ("a small yellow circle above a green square on a gray background", "2:3"),
    ("a purple triangle below an orange star", "3:4"),
)
SEED = 0
CELL = 512  # pixels: the longest side of an image in the sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-1024"))
    parser.add_argument("--output", type=Path, default=Path("demo/contact-sheet.png"))
    parser.add_argument("--num", type=int, default=len(SCENES), help="how many of the scenes")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    try:
        draw(arguments.bundle, arguments.output, SCENES[: arguments.num], arguments.steps)
    except PixArtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(arguments.output)
    return 0


def draw(bundle: Path, output: Path, scenes: tuple[tuple[str, str], ...], steps: int) -> None:
    """Make every scene at its aspect ratio and write the sheet; replaces an older one."""
    pipe = PixArtPipeline.from_bundle(bundle)
    images, captions = [], []
    for number, (prompt, aspect) in enumerate(scenes, start=1):
        started = time.monotonic()
        result = pipe(prompt, aspect_ratio=aspect, num_inference_steps=steps, seed=SEED)
        seconds = time.monotonic() - started
        print(f"[{number}/{len(scenes)}] {prompt} ({seconds:.1f} s)", file=sys.stderr)
        size = f"{result.bucket.width}x{result.bucket.height}"
        images += result.images
        captions.append(f"{prompt} [{size}, seed {SEED}]")
    guidance = Request(prompt=scenes[0][0]).resolved(pipe.manifest).sampling.guidance_scale
    facts = {"prompt": "; ".join(prompt for prompt, _ in scenes), "seed": SEED,
             "steps": steps, "guidance_scale": guidance, "bundle": pipe.manifest.key}  # fmt: skip
    write_png(contact_sheet(images, captions, columns=3, cell=CELL), output, facts, force=True)


if __name__ == "__main__":
    sys.exit(main())
