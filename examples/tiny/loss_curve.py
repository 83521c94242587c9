"""Draw the losses of a run's phases: step across, log10 of the loss up.

    python -m examples.tiny.loss_curve runs/tiny/run --out docs/images/tiny-loss.png

A phase's line is the mean loss of each line of its log.jsonl. Pillow only.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 900, 420, 60
COLORS = ("#1f5fbf", "#c4452d", "#2e8b57", "#8a3fa0", "#b8860b")


def read_log(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of a log.jsonl whose loss is finite."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]


def draw_curves(phases: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """One coloured curve a phase, side by side on a common axis of steps."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    values = [math.log10(loss) for points in phases.values() for _, loss in points]
    low, high = math.floor(min(values) * 5) / 5, math.ceil(max(values) * 5) / 5
    total = sum(points[-1][0] for points in phases.values())

    def at(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + step / total * (WIDTH - 1.5 * MARGIN)
        return x, HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 1.7 * MARGIN)

    for tick in range(round((high - low) * 5) + 1):
        value = low + tick / 5
        pen.line([at(0, value), at(total, value)], fill="#e4e4e4")
        pen.text((8, at(0, value)[1] - 6), f"{10**value:.4f}", fill="black")
    start, free = 0, 0.0  # steps before a phase; where its number may begin
    for index, (color, (name, points)) in enumerate(zip(COLORS, phases.items(), strict=False)):
        curve = [at(start + step, math.log10(loss)) for step, loss in points]
        pen.line(curve, fill=color, width=2)
        # Short phases stand close to each other: their names one below the other, to the left.
        left = min(at(start, high)[0] + 6, WIDTH - 0.5 * MARGIN - pen.textlength(name))
        pen.text((left, MARGIN * 0.7 + 4 + 14 * index), name, fill=color)
        start += points[-1][0]
        pen.line([at(start, low), at(start, high)], fill="#bbbbbb")
        width = pen.textlength(str(start))
        left = at(start, low)[0] - width / 2
        lower = 12 if left < free else 0
        pen.text((left, HEIGHT - MARGIN + 6 + lower), str(start), fill="black")
        free = left + width + 6
    pen.text((WIDTH // 2 - 130, HEIGHT - 24), "steps; loss", fill="black")
    return image


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a folder of `pixart-rt train`")
    parser.add_argument("--out", type=Path, default=Path("docs/images/tiny-loss.png"))
    args = parser.parse_args(arguments)
    logs = sorted(args.run.glob("*/log.jsonl"))
    phases = {path.parent.name: points for path in logs if (points := read_log(path))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(phases).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
