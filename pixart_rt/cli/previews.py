"""`generate --preview DIR`: a small PNG of every image every few steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pixart_rt.errors import ConfigError
from pixart_rt.files import check_into

if TYPE_CHECKING:
    from torch import Tensor

    from pixart_rt.inference.pipeline import PixArtPipeline


def check_previews(folder: Path, bundle: Path, *, force: bool) -> None:
    """Refuse, before any work, a folder that holds something already and a bundle without previews.

    Raises ConfigError and BundleError.
    """
    check_into(folder)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(
            f"--preview {folder} was requested, which is not empty; choose another folder, or "
            "replace its files with --force"
        )
    from pixart_rt.inference.preview import ColourPreview

    ColourPreview.read(bundle)


class PreviewWriter:
    """Writes image-III-step-SSS.png, images counted over all batches, steps from 1."""

    def __init__(self, folder: Path, every: int, num_steps: int) -> None:
        self._folder, self._every, self._num_steps = folder, every, num_steps
        self._first = 0  # image of the present batch

    def __call__(self, pipe: PixArtPipeline, step: int, tensors: dict[str, Tensor]) -> None:
        """Called after every step with what the pipeline gives its callback."""
        from pixart_rt.inference.images import write_png

        number = step + 1
        if number % self._every == 0:
            for row, picture in enumerate(pipe.preview(tensors["denoised"])):
                name = f"image-{self._first + row:03}-step-{number:03}.png"
                facts = {"step": number, "steps": self._num_steps}
                write_png(picture, self._folder / name, facts, force=True)
        if number == self._num_steps:
            self._first += len(tensors["latents"])
