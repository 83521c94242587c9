"""PNG files with metadata and contact sheets. Oracles: Pillow reading the file back, pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from pixart_rt.errors import ConfigError
from pixart_rt.inference.images import (
    as_image,
    contact_sheet,
    in_form,
    read_metadata,
    wrap,
    write_png,
)

RED, GREEN = (250, 10, 10), (10, 250, 10)


def plain(width: int, height: int, color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def share(image: Image.Image, color: tuple[int, int, int]) -> int:
    """How many pixels have exactly that color."""
    return int((np.asarray(image) == np.array(color)).all(-1).sum())


def dark(image: Image.Image) -> int:
    """How many pixels no color here reaches: letters."""
    return int((np.asarray(image).max(-1) < 128).sum())


def test_metadata_and_pixels_survive(tmp_path: Path) -> None:
    facts = {"prompt": "ein grüner Kreis, 緑の円\nsecond line", "seed": 2**40, "note": None,
             "guidance_scale": 4.5}  # fmt: skip
    path = write_png(plain(33, 17, GREEN), tmp_path / "new" / "a.png", facts)
    assert read_metadata(path) == {
        "prompt": facts["prompt"], "seed": str(2**40), "guidance_scale": "4.5"
    }  # fmt: skip
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert share(image, GREEN) == 33 * 17
    assert [each.name for each in path.parent.iterdir()] == ["a.png"], "nothing is left aside"


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = write_png(plain(4, 4, RED), tmp_path / "a.png", {"seed": 1})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        write_png(plain(4, 4, GREEN), path, {"seed": 2})
    assert path.read_bytes() == before
    write_png(plain(4, 4, GREEN), path, {"seed": 2}, force=True)
    assert read_metadata(path) == {"seed": "2"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_png(plain(4, 4, RED), tmp_path / "a.png", {})
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        write_png(Image.new("HSV", (2, 2)), path, {}, force=True)  # PNG has no such mode
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        write_png(plain(4, 4, RED), tmp_path, {}, force=True)


def test_only_png_has_metadata(tmp_path: Path) -> None:
    plain(4, 4, RED).save(tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match="not a PNG"):
        read_metadata(tmp_path / "a.jpg")


def test_tensors_are_rounded_to_the_nearest_byte() -> None:
    tensor = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 2, 5)
    pixels = np.asarray(as_image(tensor + 1e-4))
    assert pixels.shape == (2, 5, 3)
    assert pixels[1, 4].tolist() == [0, 128, 255]  # 127.5 and a little more; 1.0001 is clamped
    with pytest.raises(ConfigError, match=r"\[3, H, W\]"):
        as_image(torch.zeros(1, 3, 2, 2))


def test_a_sheet_shows_every_image_whole_and_text_under_it() -> None:
    images = [plain(90, 40, RED), plain(30, 60, GREEN), plain(90, 40, RED)]
    sheet = contact_sheet(images, ["first", "second", "third, " * 9])
    assert share(sheet, RED) == 2 * 90 * 40
    assert share(sheet, GREEN) == 30 * 60
    empty = contact_sheet(images, ["", "", ""])
    assert dark(empty) == 0
    assert dark(sheet) > 50, "the captions are drawn"
    assert sheet.height > empty.height, "a long caption makes its row higher"


def test_cells_shrink_images_and_keep_their_shape() -> None:
    sheet = contact_sheet([plain(200, 100, RED)], ["x"], cell=50)
    assert share(sheet, RED) == 50 * 25


@pytest.mark.parametrize(
    ("count", "columns", "expected"),
    [(1, None, 1), (4, None, 2), (5, None, 3), (5, 2, 2), (2, 9, 2)],
)
def test_columns(count: int, columns: int | None, expected: int) -> None:
    sheet = contact_sheet([plain(10, 10, RED)] * count, ["a"] * count, columns=columns)
    row = (np.asarray(sheet)[17] == np.array(RED)).all(-1)  # through the first row of images
    assert int(row.sum()) == 10 * expected


def test_sheets_refuse_what_makes_none() -> None:
    with pytest.raises(ConfigError, match="0 images"):
        contact_sheet([], [])
    with pytest.raises(ConfigError, match="2 captions"):
        contact_sheet([plain(2, 2, RED)], ["a", "b"])
    with pytest.raises(ConfigError, match="column"):
        contact_sheet([plain(2, 2, RED)], ["a"], columns=0)


@pytest.mark.parametrize("text", ["a red circle above a blue square " * 3, "x" * 300,
                                  "short " + "y" * 90 + " end", "", "one"])  # fmt: skip
def test_wrapped_lines_fit_and_lose_no_letter(text: str) -> None:
    font = ImageFont.load_default(12)
    lines = wrap(text, font, 100).split("\n")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "o.png").symlink_to("disk/real.png")
    write_png(Image.new("RGB", (4, 4)), tmp_path / "o.png", {})
    assert (tmp_path / "o.png").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.png"]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("size", [None, (40, 24), (64, 64), (33, 71), (120, 50)])
def test_size_and_form_are_diffusers(output_type: str, size: tuple[int, int] | None) -> None:
    """Bit for bit, scaled up and down, with values outside [-1, 1]."""
    from diffusers.image_processor import PixArtImageProcessor

    images = 1.3 * torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    height, width = size or (None, None)
    actual = in_form(images, height, width, output_type)
    processor = PixArtImageProcessor(vae_scale_factor=8)
    sized = images if size is None else processor.resize_and_crop_tensor(images, width, height)
    expected = processor.postprocess(sized, output_type=output_type)
    if output_type == "pil":
        actual, expected = ([np.asarray(each) for each in found] for found in (actual, expected))
    assert np.array_equal(np.asarray(actual), np.asarray(expected))
