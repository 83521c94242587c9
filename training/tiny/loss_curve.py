"""Draw the losses that `train` printed, stage after stage: step across, log10 of the MSE up.

    python -m pixart_rt.training.tiny.loss_curve runs/tiny/*.log --out docs/images/tiny-loss.png

A log line reads "<step> <seconds>s mse <value> vb <value>". Pillow only.
"""

import argparse
import math
import re
from pathlib import Path

from PIL import Image, ImageDraw

LINE = re.compile(r"^(\d+) \d+s mse ([\d.]+) vb ([\d.]+)", re.MULTILINE)
WIDTH, HEIGHT, MARGIN = 900, 420, 60
COLORS = ("#1f5fbf", "#c4452d", "#2e8b57", "#8a3fa0", "#b8860b")


def read_log(path: Path) -> list[tuple[int, float]]:
    """(step, mse) of every printed line."""
    return [(int(step), float(mse)) for step, mse, _ in LINE.findall(path.read_text())]


def draw_curves(stages: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """One coloured curve a stage, side by side on a common axis of steps."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    values = [math.log10(mse) for points in stages.values() for _, mse in points]
    low, high = math.floor(min(values) * 5) / 5, math.ceil(max(values) * 5) / 5
    total = sum(points[-1][0] for points in stages.values())

    def at(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + step / total * (WIDTH - 1.5 * MARGIN)
        return x, HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 1.7 * MARGIN)

    for tick in range(round((high - low) * 5) + 1):
        value = low + tick / 5
        pen.line([at(0, value), at(total, value)], fill="#e4e4e4")
        pen.text((8, at(0, value)[1] - 6), f"{10**value:.4f}", fill="black")
    start = 0
    for color, (name, points) in zip(COLORS, stages.items(), strict=False):
        curve = [at(start + step, math.log10(mse)) for step, mse in points]
        pen.line(curve, fill=color, width=2)
        pen.text((at(start, high)[0] + 6, 12), name, fill=color)
        start += points[-1][0]
        pen.line([at(start, low), at(start, high)], fill="#bbbbbb")
        pen.text((at(start, low)[0] - 14, HEIGHT - MARGIN + 6), str(start), fill="black")
    pen.text((WIDTH // 2 - 130, HEIGHT - 24), "steps; mean squared error of noise", fill="black")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path, help="in the order of the stages")
    parser.add_argument("--out", type=Path, default=Path("docs/images/tiny-loss.png"))
    args = parser.parse_args()
    stages = {path.stem: points for path in args.logs if (points := read_log(path))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(stages).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
