"""Read a picture of shapes back: which colours and shapes it shows, in which order.

Classic image analysis, numpy only. The border's median is the background; what differs from it
falls into connected components; a component's median colour finds the nearest palette entry, and
its mask, stretched to a square, the shape whose mask overlaps it best, sharp or rounded.
Images are [height, width, 3] float32 in 0..1.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from examples.tiny.scenes import BACKGROUNDS, PALETTE, SHAPES, Scene, signed_distance

FOREGROUND = 0.18  # distance in RGB from the background; gray to purple, the closest pair, is 0.4
MIN_AREA = 0.004  # share of the area of a square on the shorter side; small things have 0.02
MIN_OVERLAP = 0.7  # intersection over union with the best shape; drawn ones reach 0.9
WORKING_SIDE = 192  # shorter sides above it are averaged down, for speed
TEMPLATE_SIDE = 48


@dataclass(frozen=True, slots=True)
class Found:
    """A component: colour, shape ("none" if nothing fits), and its centre in pixels."""

    color: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Score:
    """How much of a caption an image shows."""

    asked: int  # things in the caption
    right: int  # of them, found with colour and shape, anywhere
    placed: int  # of them, found with colour and shape at their place in the order
    spurious: int  # components that nobody asked for
    background: bool

    @property
    def exact(self) -> bool:
        """Every thing right and placed, nothing else, on the right background."""
        return self.placed == self.asked and not self.spurious and self.background


def score(image: np.ndarray, scene: Scene) -> Score:
    """Compare what is found in the image with what the scene asks for."""
    found = find(image)
    wanted = [(thing.color, thing.shape) for thing in scene.things]
    key = (lambda item: item.x) if scene.direction == "row" else (lambda item: item.y)
    seen = [(item.color, item.shape) for item in sorted(found, key=key)]
    placed = sum(a == b for a, b in zip(wanted, seen, strict=False))
    right = sum((Counter(wanted) & Counter(seen)).values())
    off = _background(image) - np.array(BACKGROUNDS[scene.background]) / 255
    background = bool(np.linalg.norm(off) < FOREGROUND)
    return Score(len(wanted), right, placed, max(len(seen) - len(wanted), 0), background)


def find(image: np.ndarray) -> list[Found]:
    """The shapes of an image, in no particular order."""
    small = _shrink(np.asarray(image, np.float32))
    scale = image.shape[0] / small.shape[0]
    contrast = np.linalg.norm(small - _background(small), axis=-1)
    labels = connected_components(contrast > FOREGROUND)
    smallest = MIN_AREA * min(contrast.shape) ** 2
    found = []
    for label in range(1, labels.max() + 1):
        part = labels == label
        if part.sum() < smallest:
            continue
        full = np.percentile(contrast[part], 75)
        color = _nearest(np.median(small[part & (contrast > 0.8 * full)], axis=0), PALETTE)
        part &= contrast > full / 2  # where a blurred edge really runs
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        box = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
        shape = classify(box) if box.shape != contrast.shape else "none"  # noise fills the image
        found.append(Found(color, shape, x * scale, y * scale))
    return found


def classify(box: np.ndarray) -> str:
    """The shape whose template overlaps the mask [h, w] best, or "none"."""
    height, width = box.shape
    if not 0.6 < width / height < 1.6:
        return "none"
    square = _stretch(box)
    overlaps = {
        shape: max((square & template).sum() / (square | template).sum() for template in variants)
        for shape, variants in _templates().items()
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else "none"


@cache
def _templates() -> dict[str, list[np.ndarray]]:
    """Each shape's masks, sharp and with rounded corners, bounding boxes stretched to a square."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    templates = {}
    for shape in SHAPES:
        mask = signed_distance(shape, axis[None], axis[:, None], 1.0) <= 0
        templates[shape] = [_stretch(_round(mask, width)) for width in (1, 21, 41)]
    return templates


def _round(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask blurred by a box of `width` along each axis, twice, and cut at one half."""
    blurred, kernel = mask.astype(np.float32), np.ones(width, np.float32) / width
    for axis in (0, 1, 0, 1):
        blurred = np.apply_along_axis(np.convolve, axis, blurred, kernel, "same")
    return blurred > 0.5


def _stretch(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box sampled at TEMPLATE_SIDE x TEMPLATE_SIDE points."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    steps = (np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE
    ys = rows[0] + (steps * (rows[-1] - rows[0] + 1)).astype(int)
    xs = columns[0] + (steps * (columns[-1] - columns[0] + 1)).astype(int)
    return mask[ys][:, xs]


def connected_components(mask: np.ndarray) -> np.ndarray:
    """Labels 1.. of the 4-connected parts of a mask [h, w], 0 outside: runs and union-find."""
    labels = np.zeros(mask.shape, np.int32)
    parents: list[int] = []
    above: list[tuple[int, int, int]] = []  # runs of the row above: (start, end, run)
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        current = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            run = len(parents)
            parents.append(run)
            labels[y, start:end] = run + 1
            current.append((start, end, run))
            for other_start, other_end, other in above:
                if other_start < end and start < other_end:
                    parents[_root(parents, run)] = _root(parents, other)
        above = current
    if not parents:
        return labels
    roots = np.array([_root(parents, run) for run in range(len(parents))])
    _, compact = np.unique(roots, return_inverse=True)
    return np.concatenate([[0], compact + 1])[labels]


def _root(parents: list[int], run: int) -> int:
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run


def _background(image: np.ndarray) -> np.ndarray:
    """Median colour [3] of the border, where no thing reaches far."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.median(border, axis=0)


def _shrink(image: np.ndarray) -> np.ndarray:
    """Average whole blocks until the shorter side is near WORKING_SIDE."""
    factor = max(min(image.shape[:2]) // WORKING_SIDE, 1)
    height, width = (side // factor * factor for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return blocks.mean(axis=(1, 3))


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: np.linalg.norm(color - np.array(palette[name]) / 255))
