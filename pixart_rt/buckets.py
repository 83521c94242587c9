"""The 40 aspect ratios that PixArt was trained on, per resolution, and how a size finds its own.

A bucket is a height and a width in pixels whose area is close to resolution². Keys are height over
width, rounded, as in the training data (paper, Section A.5); the nearest key decides, so the keys
are kept literally. 512 and 256 are the 1024 table halved and quartered.

In tokens (one token covers 16×16 pixels) the 40 buckets of a resolution lie within 10 % of each
other: 3696 to 4096 at 1024, 924 to 1024 at 512, 231 to 256 at 256.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from pixart_rt.errors import ConfigError, shorten

VAE_SCALE_FACTOR = 8  # pixels per latent pixel, along a side
PIXELS_PER_TOKEN = 2 * VAE_SCALE_FACTOR  # a patch is two latent pixels wide
_NUMBER = r"([0-9]{1,6}(?:\.[0-9]{1,6})?)"
_ASPECT = re.compile(rf"{_NUMBER}(?::{_NUMBER})?")  # no signs, exponents, spaces or fractions
RESOLUTIONS = (256, 512, 1024)
WIDEST = 4  # times as wide as high, or as high as wide

_TABLE_1024: tuple[tuple[float, int, int], ...] = (  # height / width, height, width
    (0.25, 512, 2048), (0.26, 512, 1984), (0.27, 512, 1920), (0.28, 512, 1856),
    (0.32, 576, 1792), (0.33, 576, 1728), (0.35, 576, 1664), (0.4, 640, 1600),
    (0.42, 640, 1536), (0.48, 704, 1472), (0.5, 704, 1408), (0.52, 704, 1344),
    (0.57, 768, 1344), (0.6, 768, 1280), (0.68, 832, 1216), (0.72, 832, 1152),
    (0.78, 896, 1152), (0.82, 896, 1088), (0.88, 960, 1088), (0.94, 960, 1024),
    (1.0, 1024, 1024), (1.07, 1024, 960), (1.13, 1088, 960), (1.21, 1088, 896),
    (1.29, 1152, 896), (1.38, 1152, 832), (1.46, 1216, 832), (1.67, 1280, 768),
    (1.75, 1344, 768), (2.0, 1408, 704), (2.09, 1472, 704), (2.4, 1536, 640),
    (2.5, 1600, 640), (2.89, 1664, 576), (3.0, 1728, 576), (3.11, 1792, 576),
    (3.62, 1856, 512), (3.75, 1920, 512), (3.88, 1984, 512), (4.0, 2048, 512),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """One trained image size. `ratio` is the table's key, height over width."""

    ratio: float
    height: int  # pixels
    width: int  # pixels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // PIXELS_PER_TOKEN, self.width // PIXELS_PER_TOKEN

    @property
    def num_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns


def buckets(resolution: int) -> tuple[Bucket, ...]:
    """The 40 buckets of a resolution (256, 512 or 1024 pixels), widest image first."""
    if resolution not in RESOLUTIONS:
        raise ConfigError(
            f"resolution {resolution} has no bucket table; choose one of {RESOLUTIONS}"
        )
    shrink = 1024 // resolution
    return tuple(
        Bucket(ratio=ratio, height=height // shrink, width=width // shrink)
        for ratio, height, width in _TABLE_1024
    )


def nearest_bucket(resolution: int, height: int, width: int) -> Bucket:
    """The bucket whose height / width is nearest to the asked one's."""
    if height <= 0 or width <= 0:
        raise ConfigError(
            f"an image of {height}x{width} pixels was requested; sides must be positive"
        )
    asked = height / width
    return min(buckets(resolution), key=lambda bucket: abs(bucket.ratio - asked))


def bucket_for_aspect(resolution: int, aspect_ratio: str) -> Bucket:
    """The bucket nearest to "W:H" (as in "3:2", landscape) or to a decimal width / height.

    Both are plain decimals of at most six digits before the point and six after it.
    """
    written = _ASPECT.fullmatch(aspect_ratio)
    width, height = (Fraction(part or "1") for part in written.groups()) if written else (0, 0)
    if not width or not height:
        raise ConfigError(
            f"aspect ratio {shorten(aspect_ratio)} is not width:height; write it as 3:2, 1:1 or "
            "9:16"
        )
    shape = Fraction(width) / height
    _check_trained(shape, aspect_ratio)
    return nearest_bucket(resolution, shape.denominator, shape.numerator)


def _check_trained(shape: Fraction, asked: str) -> None:
    """Refuse what no bucket comes near: the image would be another than was requested."""
    if not 1 <= max(shape, 1 / shape) <= WIDEST:
        raise ConfigError(
            f"aspect ratio {shorten(asked)} is not supported; the model draws 1:{WIDEST} to "
            f"{WIDEST}:1"
        )


def choose_bucket(
    resolution: int, aspect_ratio: str | None, height: int | None, width: int | None
) -> Bucket:
    """The bucket of an aspect ratio or of a height and width in pixels; square if none is given."""
    if (height is None) != (width is None):
        raise ConfigError("height and width go together; one was given without the other")
    if height is None or width is None:
        return bucket_for_aspect(resolution, aspect_ratio or "1:1")
    if aspect_ratio is not None:
        raise ConfigError("give an aspect ratio or height and width, not both")
    if height > 0 and width > 0:
        _check_trained(Fraction(width, height), f"{width}:{height}")
    return nearest_bucket(resolution, height, width)


def token_range(resolution: int) -> tuple[int, int]:
    """The smallest and the largest token count of a resolution's buckets."""
    counts = [bucket.num_tokens for bucket in buckets(resolution)]
    return min(counts), max(counts)
