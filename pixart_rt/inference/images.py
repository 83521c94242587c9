"""Finished images: the size and form that was requested, PNG files with metadata, captioned sheets.

A file is written aside and renamed, so it is whole or absent, and no file is replaced unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from pixart_rt.errors import ConfigError
from pixart_rt.files import check_file, replacing

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 12  # pixels between the images of a sheet and around it
FONT_SHARE = 22  # a caption's letters are the cell's width over this many pixels high
SMALLEST_FONT = 11
PAPER, INK = (255, 255, 255), (32, 32, 32)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def as_image(image: Image.Image | Tensor) -> Image.Image:
    """A PIL image as it is; a tensor [3, H, W] of values in 0..1 (output_type="pt") rounded."""
    if isinstance(image, Image.Image):
        return image
    if image.dim() != 3 or image.shape[0] != 3:
        raise ConfigError(f"an image is a tensor [3, H, W] in 0..1, got {tuple(image.shape)}")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().permute(1, 2, 0)
    return Image.fromarray(pixels.byte().cpu().numpy())


def in_form(images: Tensor, height: int | None, width: int | None, output_type: str) -> Any:
    """The decoder's images [B, 3, H, W] in about [-1, 1] in the asked size and form.

    output_type: "pil" (a list), "np" ([B, H, W, 3] in 0..1), "pt" ([B, 3, H, W] in 0..1), or
    "latent", which is returned as it is. Sizes and values are those of diffusers'
    PixArtImageProcessor, bit for bit.
    """
    if output_type == "latent":
        return images
    if height is not None and width is not None:
        images = resize_and_crop(images, height, width)
    images = (images * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.cpu().permute(0, 2, 3, 1).float().numpy()
    if output_type == "np":
        return pixels
    return [Image.fromarray(each) for each in (pixels * 255).round().astype("uint8")]


def resize_and_crop(images: Tensor, height: int, width: int) -> Tensor:
    """images [B, C, H, W] scaled to cover height x width, bilinearly, and centre-cropped to it."""
    import torch.nn.functional as F  # here: commands that only check a PNG load no torch

    if images.shape[-2:] == (height, width):
        return images
    scale = max(height / images.shape[2], width / images.shape[3])
    size = int(images.shape[2] * scale), int(images.shape[3] * scale)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def refuse_existing(paths: Iterable[Path], *, force: bool) -> None:
    """Stop before any work whose result could not be kept (files.py). Raises ConfigError."""
    for path in paths:
        check_file(path, force=force)


def write_png(
    image: Image.Image | Tensor, path: Path, metadata: Mapping[str, object], *, force: bool = False
) -> Path:
    """Write a PNG whose text chunks are `metadata`; None values are left out.

    Raises ConfigError when the file exists and `force` is not set.
    """
    path = Path(path)
    refuse_existing([path], force=force)
    chunks = PngImagePlugin.PngInfo()
    for name, value in metadata.items():
        if value is not None:
            chunks.add_text(name, str(value))
    with replacing(path) as aside:
        as_image(image).save(aside, format="PNG", pnginfo=chunks)
    return path


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises ConfigError for a file that is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {str(name): str(text) for name, text in image.text.items()}
    except UnidentifiedImageError as error:
        raise ConfigError(f"{path} is not a PNG; only PNG files carry metadata") from error


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    cell: int | None = None,
) -> Image.Image:
    """A grid of images, each with its caption below.

    columns: by default the smallest square grid that holds all images. cell: the longest side an
    image may have in the sheet, in pixels; by default images keep their size.
    """
    if not images or len(images) != len(captions):
        raise ConfigError(f"{len(images)} images with {len(captions)} captions make no sheet")
    if columns is not None and columns < 1:
        raise ConfigError(f"a sheet needs at least one column, got {columns}")
    small = [_shrink(image, cell) for image in images]
    columns = min(columns or _square(len(small)), len(small))
    width = max(image.width for image in small)
    font = ImageFont.load_default(max(SMALLEST_FONT, width // FONT_SHARE))
    texts = [wrap(caption, font, width) for caption in captions]
    rows = [
        (small[start : start + columns], texts[start : start + columns])
        for start in range(0, len(small), columns)
    ]
    return _paste(rows, columns, width, font)


def _shrink(image: Image.Image, side: int | None) -> Image.Image:
    copy = image.convert("RGB")
    if side is not None:
        copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def _square(count: int) -> int:
    """Columns of the smallest square grid of `count` cells."""
    side = 1
    while side * side < count:
        side += 1
    return side


def wrap(text: str, font: Font, width: int) -> str:
    """`text` in lines no wider than `width` pixels; a word that is wider is cut."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or
                        font.getlength(word[:n]) <= width)  # fmt: skip
            lines += [line, word[:fits]] if line else [word[:fits]]
            line, word = "", word[fits:]
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return "\n".join([*lines, line] if line else lines)


def _paste(
    rows: list[tuple[list[Image.Image], list[str]]], columns: int, width: int, font: Font
) -> Image.Image:
    """Rows as high as their highest image and longest caption; images centred in their cells."""
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    picture_heights = [max(image.height for image in images) for images, _ in rows]
    text_heights = [
        max(int(scratch.multiline_textbbox((0, 0), text, font=font)[3]) + 1 for text in texts)
        for _, texts in rows
    ]
    height = MARGIN + sum(picture_heights) + sum(text_heights) + 2 * MARGIN * len(rows)
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for (images, texts), picture, caption in zip(rows, picture_heights, text_heights, strict=True):
        for column, (image, text) in enumerate(zip(images, texts, strict=True)):
            left = MARGIN + column * (width + MARGIN)
            offset = (left + (width - image.width) // 2, top + (picture - image.height) // 2)
            sheet.paste(image, offset)
            draw.multiline_text((left, top + picture + MARGIN // 2), text, INK, font=font)
        top += picture + caption + 2 * MARGIN
    return sheet
