"""Captioned scenes drawn from formulas: one to three coloured shapes in a row or a column.

A scene is a list of objects, the direction they line up in (left to right, or top to bottom) and
a background. The same scene can be drawn at any size and any crop, and said in several ways.
The combination (direction, colours and shapes in order) decides by a hash whether a scene belongs
to training or is held out, so "A above B" and "B below A" always fall on the same side.
Images are [height, width, 3] float32 in 0..1.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

PALETTE = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "blue": (35, 80, 225),
    "purple": (150, 45, 180),
}
BACKGROUNDS = {"white": (248, 248, 248), "gray": (128, 128, 128), "black": (12, 12, 12)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"": 0.34, "small": 0.24, "large": 0.43}  # circumradius over the side of an object's cell
PREFIXES = ("", "", "an image of ", "a picture of ", "there is ", "a drawing of ")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what its noun phrase says."""

    color: str
    shape: str
    size: str = ""

    def phrase(self) -> str:
        words = " ".join(word for word in (self.size, self.color, self.shape) if word)
        return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in order: left to right if `direction` is "row", top to bottom if it is "column"."""

    things: tuple[Thing, ...]
    direction: str = "row"
    background: str = "white"

    def key(self) -> str:
        """What must be new for the scene to count as never seen: order, colours and shapes."""
        direction = self.direction if len(self.things) > 1 else "single"
        return " ".join([direction, *(f"{thing.color}-{thing.shape}" for thing in self.things)])

    def held_out(self) -> bool:
        digest = hashlib.sha256(self.key().encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def random_scene(rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """A scene of one (15 %), two (55 %) or three (30 %) things from the asked side of the split."""
    while True:
        count = int(rng.choice(3, p=[0.15, 0.55, 0.30])) + 1
        scene = Scene(
            tuple(_random_thing(rng) for _ in range(count)),
            "row" if rng.random() < 0.5 else "column",
            "white" if rng.random() < 0.5 else str(rng.choice(list(BACKGROUNDS))),
        )
        if held_out is None or scene.held_out() == held_out:
            return scene


def one_thing(rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """A scene of one thing from the asked side of the split."""
    while True:
        scene = random_scene(rng, held_out)
        if len(scene.things) == 1:
            return scene


def only_one(scene: Scene, rng: np.random.Generator) -> Scene:
    """What a caption says that names one of the scene's things and leaves out the others."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return replace(scene, things=(thing,))


def _random_thing(rng: np.random.Generator) -> Thing:
    size = str(rng.choice(["small", "large"])) if rng.random() < 0.2 else ""
    return Thing(str(rng.choice(list(PALETTE))), str(rng.choice(SHAPES)), size)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the scene's phrasings, lower case."""
    nouns = [thing.phrase() for thing in scene.things]
    if len(nouns) == 1:
        text = nouns[0]
    elif len(nouns) == 2:
        ahead, behind = {
            "row": ("to the left of", "to the right of"),
            "column": ("above", "below"),
        }[scene.direction]
        first, second = nouns
        text = f"{first} {ahead} {second}"
        if rng.random() < 0.5:
            text = f"{second} {behind} {first}"
    else:
        text = f"{nouns[0]}, {nouns[1]} and {nouns[2]} in a {scene.direction}"
    text = str(rng.choice(PREFIXES)) + text
    if scene.background != "white" or rng.random() < 0.3:
        text += f" on a {scene.background} background"
    return text


def vocabulary() -> list[str]:
    """Every word that a caption may have, sorted: what the tiny model has ever read."""
    texts = [
        *PALETTE, *BACKGROUNDS, *SHAPES, *SIZES, *PREFIXES,
        "a an to the left of right above below and in row column on background",
    ]  # fmt: skip
    return sorted({word for text in texts for word in text.split()})


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a thing stands: centre and circumradius in pixels of the whole image."""

    x: float
    y: float
    radius: float


def place(scene: Scene, height: int, width: int, rng: np.random.Generator) -> list[Placement]:
    """A cell for each thing, and the thing near the middle of its cell."""
    count = len(scene.things)
    across = scene.direction == "row"
    cell_h, cell_w = (height, width / count) if across else (height / count, width)
    if count == 1:
        cell_h, cell_w = height, width
    side = min(cell_h, cell_w) * (0.75 if count == 1 else 1.0)
    places = []
    for index, thing in enumerate(scene.things):
        column, row = (index, 0) if across else (0, index)
        x, y = (column + 0.5) * cell_w, (row + 0.5) * cell_h
        jitter = rng.uniform(-0.05, 0.05, 2) * side
        radius = SIZES[thing.size] * side * rng.uniform(0.94, 1.06)
        places.append(Placement(x + jitter[0], y + jitter[1], radius))
    return places


def draw(
    scene: Scene,
    places: list[Placement],
    height: int,
    width: int,
    left: int = 0,
    top: int = 0,
) -> np.ndarray:
    """The window of `height` x `width` pixels at (left, top), antialiased: [height, width, 3]."""
    image = np.empty((height, width, 3), np.float32)
    image[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    for thing, place_ in zip(scene.things, places, strict=True):
        x, y, reach = place_.x - left, place_.y - top, 1.15 * place_.radius + 2
        x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 1, width)
        y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        xs = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - x)
        ys = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - y)
        distance = signed_distance(thing.shape, xs, ys, place_.radius)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        color = np.asarray(PALETTE[thing.color], np.float32) / 255
        image[y0:y1, x0:x1] += cover * (color - image[y0:y1, x0:x1])
    return image


def signed_distance(shape: str, xs: np.ndarray, ys: np.ndarray, radius: float) -> np.ndarray:
    """Pixels to the outline, negative inside; xs [1, W] and ys [H, 1] count from the centre."""
    if shape == "circle":
        return np.sqrt(xs * xs + ys * ys) - np.float32(0.92 * radius)
    if shape == "square":
        half = np.float32(0.8 * radius)
        return np.maximum(np.abs(xs), np.abs(ys)) - half
    corners = _corners(shape) * np.float32(radius)
    nearest = np.full(np.broadcast_shapes(xs.shape, ys.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, xs - ax, ys - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > ys) != (by > ys)
        if ey != 0:
            inside ^= crosses & (px < ex * py / ey)
    return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(nearest)


def _corners(shape: str) -> np.ndarray:
    """Unit outline, point up, y downwards: [corners, 2], moved so that its box is centred."""
    if shape == "triangle":
        radii, angles = np.ones(3), np.arange(3) * 2 * np.pi / 3
    else:
        radii, angles = np.where(np.arange(10) % 2, 0.46, 1.08), np.arange(10) * np.pi / 5
    outline = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)
    return (outline - (outline.max(0) + outline.min(0)) / 2).astype(np.float32)
