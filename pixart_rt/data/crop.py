"""A picture in a file to RGB pixels of exactly a bucket's size, without squashing it.

    scale = max(H / h, W / w)                 the picture covers the bucket
    box   = centred, H / scale by W / scale   what is kept of it, in its own pixels

The box is resampled to the bucket in one step (bicubic, antialiased), so both axes are scaled by
the same factor to the last bit; resizing to whole pixels first would not. The original code resizes
to the bucket's size and so changes the aspect ratio of every picture that is not a bucket's.

Sizes are (height, width) of the picture as it is to be seen, after its EXIF orientation.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pixart_rt.buckets import PIXELS_PER_TOKEN, Bucket, buckets
from pixart_rt.errors import ConfigError, DataError

ORIENTATION = 0x0112  # the EXIF tag; its values from 5 lie on their side
PAPER = (255, 255, 255)  # what shows through transparent pixels
FILE_ERRORS = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
"""Errors of one path. Others (no permission, a disk that fails) would be those of all paths."""


def bucket_table(resolution: int, *, square: bool) -> tuple[Bucket, ...]:
    """The buckets that pictures are cut to: the 40 of a resolution, or one square of any side.

    Raises ConfigError for a resolution without a table, or a side that is no multiple of 16.
    """
    if not square:
        return buckets(resolution)
    if resolution < 1 or resolution % PIXELS_PER_TOKEN:
        raise ConfigError(
            f"squares of {resolution} px are not supported; use a multiple of {PIXELS_PER_TOKEN}"
        )
    return (Bucket(ratio=1.0, height=resolution, width=resolution),)


def nearest(table: Sequence[Bucket], height: int, width: int) -> int:
    """The index of the bucket whose height / width is nearest to a picture's."""
    return min(range(len(table)), key=lambda index: abs(table[index].ratio - height / width))


@dataclass(frozen=True, slots=True)
class Fitted:
    """pixels [H, W, 3] uint8, and where in the picture they are from."""

    pixels: npt.NDArray[np.uint8]
    original_size: tuple[int, int]
    crop: tuple[float, float, float, float]  # top, left, height, width in the picture's pixels


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture from its header. Raises DataError for what is no image."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except Exception as error:  # decoders raise anything on damaged bytes
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, without decoding pixels: for PNG, getexif() would."""
    if image.format != "PNG":
        return int(image.getexif().get(ORIENTATION, 1))
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return int(exif.get(ORIENTATION, 1))


def open_rgb(path: Path) -> Image.Image:
    """A picture upright and in RGB: transparency on white, first frame of an animation.

    Raises DataError for a file that is missing, truncated, no image or implausibly large.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return as_rgb(upright)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise _unreadable(path, error) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes in RGB. Raises ValueError for one that has no range (F, wide I)."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to the lowest 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; convert the file")
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*PAPER, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def crop_box(height: int, width: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The centred part of a picture that has the bucket's shape: top, left, height, width."""
    scale = max(bucket.height / height, bucket.width / width)
    kept_height, kept_width = bucket.height / scale, bucket.width / scale
    kept_height, kept_width = min(kept_height, height), min(kept_width, width)  # but for rounding
    return (height - kept_height) / 2, (width - kept_width) / 2, kept_height, kept_width


def fit(image: Image.Image, bucket: Bucket) -> Fitted:
    """The pixels of an RGB picture at the bucket's size."""
    crop = crop_box(image.height, image.width, bucket)
    top, left, height, width = crop
    resized = image.resize(
        (bucket.width, bucket.height),
        Image.Resampling.BICUBIC,
        box=(left, top, min(left + width, image.width), min(top + height, image.height)),
    )
    return Fitted(np.asarray(resized), (image.height, image.width), crop)


def _unreadable(path: Path, error: Exception) -> Exception:
    """A DataError about this file, or the error itself if it is not the file's."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in FILE_ERRORS:
        return error
    if isinstance(error, FileNotFoundError):
        reason = "there is no such file"
    elif isinstance(error, UnidentifiedImageError):
        reason = "this is no image that Pillow can read"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: {reason}")
