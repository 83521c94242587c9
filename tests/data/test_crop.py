"""Pictures to bucket sizes: nothing squashed, orientation and colour modes kept in mind."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from PIL import Image

from pixart_rt.buckets import Bucket, buckets
from pixart_rt.data.crop import bucket_table, crop_box, fit, nearest, open_rgb, read_size
from pixart_rt.errors import DataError

RNG = np.random.default_rng(0)


def disc(height: int, width: int) -> Image.Image:
    """A black disc in the middle of a white picture, as wide as a third of the shorter side."""
    ys, xs = np.mgrid[:height, :width] + 0.5
    radius = min(height, width) / 6
    inside = (ys - height / 2) ** 2 + (xs - width / 2) ** 2 < radius**2
    return Image.fromarray(np.where(inside[..., None], 0, 255).astype(np.uint8).repeat(3, 2))


def unroundness(picture: np.ndarray | Image.Image) -> int:
    """Pixels by which the dark disc is higher than wide, or wider than high."""
    dark = np.asarray(picture)[..., 0] < 128
    return abs(int(dark.any(1).sum()) - int(dark.any(0).sum()))


@pytest.mark.parametrize("size", [(300, 1800), (1560, 1000), (2190, 350), (91, 700), (1000, 2240)])
@pytest.mark.parametrize("resolution", [256, 1024])
def test_a_disc_stays_a_disc(size, resolution):
    """The original resizes to the bucket's size and so squashes what is not of a bucket's shape.

    The sizes are beyond the buckets or midway between two, where its way shows, as is checked.
    """
    table = buckets(resolution)
    bucket = table[nearest(table, *size)]
    scale = max(bucket.height / size[0], bucket.width / size[1])
    bound = 2 * max(scale, 1)  # each edge lies within half a source pixel of the true one
    picture = disc(*size)
    assert unroundness(fit(picture, bucket).pixels) <= bound
    assert unroundness(picture.resize((bucket.width, bucket.height))) > bound
    dark = fit(picture, bucket).pixels[..., 0] < 128
    assert dark.any(1).sum() == pytest.approx(min(size) / 3 * scale, abs=bound)


@pytest.mark.parametrize("seed", range(30))
def test_the_box_is_centred_inside_and_of_the_buckets_shape(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 5000, 2))
    table = bucket_table(512, square=seed % 5 == 0)
    bucket = table[nearest(table, height, width)]
    top, left, tall, wide = crop_box(height, width, bucket)
    assert tall / wide == pytest.approx(bucket.height / bucket.width, rel=1e-9)
    assert top >= 0 and left >= 0
    assert (2 * top + tall, 2 * left + wide) == pytest.approx((height, width))
    assert tall == pytest.approx(height) or wide == pytest.approx(width), "more was cut than needed"


def test_a_picture_of_the_buckets_size_is_kept_bit_for_bit():
    pixels = RNG.integers(0, 256, (272, 240, 3), dtype=np.uint8)
    bucket = buckets(256)[nearest(buckets(256), 272, 240)]
    fitted = fit(Image.fromarray(pixels), bucket)
    np.testing.assert_array_equal(fitted.pixels, pixels)
    assert (fitted.original_size, fitted.crop) == ((272, 240), (0.0, 0.0, 272.0, 240.0))


def test_resizing_then_cropping_gives_nearly_the_same():
    """The two-step way, where its rounding to whole pixels happens to be exact."""
    smooth = np.asarray(Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (800, 512), Image.Resampling.BICUBIC))  # fmt: skip
    bucket = Bucket(ratio=1.0, height=256, width=256)
    two_steps = Image.fromarray(smooth).resize((400, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(two_steps.crop((72, 0, 328, 256))).astype(int)
    actual = fit(Image.fromarray(smooth), bucket).pixels.astype(int)
    assert abs(actual - expected).max() <= 1  # rounding to 8 bits


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    """Every orientation of one upright picture looks, and measures, like the picture."""
    upright = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = upright
    if orientation > 1:
        stored = upright.transpose(getattr(Image.Transpose, undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    assert read_size(path) == (20, 30)
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), np.asarray(upright))


def test_colour_modes_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 6), (200, 30, 10))

    def shown(image: Image.Image, name: str, **options: object) -> tuple[int, ...]:
        image.save(tmp_path / name, **options)
        result = open_rgb(tmp_path / name)
        assert (result.mode, result.size) == ("RGB", (8, 6))
        return result.getpixel((4, 3))

    assert shown(red.quantize(4), "palette.png") == (200, 30, 10)
    assert shown(red.convert("L"), "gray.png") == (red.convert("L").getpixel((0, 0)),) * 3
    assert shown(red.convert("1", dither=Image.Dither.NONE), "bits.png") in ((0,) * 3, (255,) * 3)
    cmyk = shown(red.convert("CMYK"), "cmyk.jpg", quality=95)
    assert np.abs(np.subtract(cmyk, (200, 30, 10))).max() < 12  # JPEG
    half = Image.new("RGBA", (8, 6), (200, 30, 10, 51))  # a fifth of it, on white
    assert shown(half, "alpha.png") == pytest.approx((244, 210, 206), abs=1)
    assert shown(Image.new("RGBA", (8, 6), (0, 0, 0, 0)), "clear.png") == (255, 255, 255)
    assert shown(Image.new("LA", (8, 6), (0, 0)), "clear-gray.png") == (255, 255, 255)
    see_through = red.quantize(4)
    shade = see_through.getpixel((0, 0))
    assert shown(see_through, "clear-palette.png", transparency=shade) == (255, 255, 255)
    deep = Image.fromarray(np.full((6, 8), 40000, np.uint16))  # Pillow's own convert clips to 255
    assert shown(deep, "deep.png") == (40000 >> 8,) * 3


def test_unreadable_files_have_a_reason(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(RNG.integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    (tmp_path / "folder.png").mkdir()
    for name, reason in {
        "none.png": "there is no such file", "text.jpg": "no image", "empty.png": "no image",
        "cut.png": "truncated", "float.tiff": "mode F", "folder.png": "directory",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=reason):
            open_rgb(tmp_path / name)


def test_a_failing_disk_is_not_a_bad_picture(tmp_path, monkeypatch):
    """Skipping a million images because the file system went away would be a silent disaster."""

    def fail(path: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        open_rgb(tmp_path / "any.png")
