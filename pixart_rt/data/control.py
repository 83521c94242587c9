"""Training batches with control images, for a ControlNet: encoded on the fly, or from two stores.

    ControlledSource   an OnlineSource and an EdgeFinder; nothing else is stored
    PairedSource       a feature store of the images and one of their edges

The second store is made by the command that makes the first, from a folder that `draw_edges` wrote:
edges of each picture as it is cut to its bucket, under the same lines of metadata, without text.
Both give the same latents, but for the rounding to float16 that a store does: the mean of the VAE's
distribution. (The original code draws from it, at each use again.)

B images, H×W pixels, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.data.batch import Batch
from pixart_rt.data.crop import fit, nearest, open_rgb
from pixart_rt.data.edges import EdgeFinder, Edges
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.folder import METADATA, ImageFolder
from pixart_rt.data.loader import identity_of
from pixart_rt.data.online import OnlineSource, Pictures
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import DataError
from pixart_rt.files import replacing

_BEGUN = "edges.json"  # what the drawn edges are of
_FOLDER_IMAGES = 10_000  # in one subfolder of drawn edges


@dataclass(frozen=True, slots=True)
class ControlPictures:
    """A step's pictures and their edges before they are encoded; what a worker hands over."""

    pictures: Pictures
    edges: Edges  # [B, H, W]


class ControlledSource:
    """Pictures of an OnlineSource with their edges, both encoded anew at every use.

    Edges are found by `load`, in the workers; encoded by `finish`, in the process that trains.
    """

    def __init__(self, source: OnlineSource, edges: EdgeFinder) -> None:
        self.source, self.edges = source, edges

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.source.buckets

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        return self.source.bucket_of

    @property
    def empty_prompt(self) -> Tensor:
        return self.source.empty_prompt

    @property
    def identity(self) -> str:
        """Changes with the pictures, the encoders and the finder."""
        return identity_of({**self.source.about, "edges": repr(self.edges)})

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> ControlPictures:
        """As OnlineSource.load."""
        pictures = self.source.load(ids, seed=seed, step=step)
        return ControlPictures(pictures, np.stack([self.edges(each) for each in pictures.pixels]))

    def finish(self, loaded: ControlPictures) -> Batch:
        """As OnlineSource.finish, and the edges' latents."""
        batch = self.source.finish(loaded.pictures)
        assert self.source.encoder is not None
        return replace(batch, condition=control_latents(self.source.encoder, loaded.edges))


def control_latents(encoder: FeatureEncoder, edges: Edges) -> Tensor:
    """Edges [B, H, W] through the VAE: the scaled means [B, C, h, w] float32, on the CPU."""
    moments = encoder.moments([np.repeat(each[..., None], 3, axis=2) for each in edges])
    return moments[:, 0] * encoder.scaling_factor


class PairedSource:
    """A store of images and a store of their edges, sample by sample the same pictures.

    Raises DataError where the second was not made of the first's pictures at the same sizes.
    """

    def __init__(self, images: FeatureStore, controls: FeatureStore) -> None:
        self.images, self.controls = images, controls
        for what, mine, theirs in (
            ("samples", len(images), len(controls)),
            ("buckets", images.buckets, controls.buckets),
            ("lines of metadata", images.sources.tolist(), controls.sources.tolist()),
            ("buckets of the samples", images.bucket_of.tolist(), controls.bucket_of.tolist()),
            ("scaling factor", images.manifest.scaling_factor, controls.manifest.scaling_factor),
        ):
            if mine != theirs:
                raise DataError(
                    f"{controls.path} does not belong to {images.path}: their {what} differ; "
                    "extract it from what `pixart-rt data edges` made of the same images, with the "
                    "same options"
                )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.images.buckets

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        return self.images.bucket_of

    @property
    def empty_prompt(self) -> Tensor:
        return self.images.empty_prompt

    @property
    def identity(self) -> str:
        """Changes with either store's pictures and encoders."""
        stores = {"images": self.images, "edges": self.controls}
        return identity_of({name: each.manifest.identity for name, each in stores.items()})

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Batch:
        """As FeatureStore.load, and the edges' latents."""
        batch = self.images.load(ids, seed=seed, step=step)
        means = torch.stack([self.controls.moments(int(sample))[0] for sample in ids]).float()
        return replace(batch, condition=means * self.controls.manifest.scaling_factor)

    def finish(self, loaded: Batch) -> Batch:
        """Nothing is left to do."""
        return loaded


def draw_edges(
    images: ImageFolder,
    out: Path,
    table: Sequence[Bucket],
    edges: EdgeFinder,
    *,
    threads: int = 4,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> int:
    """Write an ImageFolder of edges to extract features of; returns the pictures left out.

    A line for each line of `images`, with an empty caption, and a PNG of its bucket's size. What
    cannot be read has a line and no PNG, so that lines stay aligned; `data extract` skips it as it
    skips the picture. A second call makes what is missing: PNGs are written whole, metadata last.
    Raises DataError for a folder that holds something else, edges of another kind for instance.
    """
    out = Path(out)
    _begin(images, out, table, edges)
    draw = partial(_draw, images, out, table, edges)
    left_out = 0
    with ThreadPoolExecutor(threads) as pool:
        for done, drawn in enumerate(pool.map(draw, range(len(images)))):
            left_out += not drawn
            progress("edges", done, len(images))
    lines = (json.dumps({"file_name": _name(n), "text": ""}) + "\n" for n in range(len(images)))
    with replacing(out / METADATA) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    return left_out


def _begin(images: ImageFolder, out: Path, table: Sequence[Bucket], edges: EdgeFinder) -> None:
    """Say in the folder what is drawn, or refuse one that says something else."""
    told = json.dumps({
        "images": images.digest(), "edges": repr(edges),
        "buckets": [[bucket.height, bucket.width] for bucket in table],
    })  # fmt: skip
    if not out.exists() or (out.is_dir() and all(_is_hidden(each) for each in out.iterdir())):
        with replacing(out / _BEGUN) as aside:
            aside.write_text(told, encoding="utf-8")
    elif not (out / _BEGUN).is_file() or (out / _BEGUN).read_text(encoding="utf-8") != told:
        raise DataError(
            f"{out} exists and holds something else than these edges of these images; choose "
            "another folder, or remove it"
        )


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")  # what a killed run may have left


def _draw(
    images: ImageFolder, out: Path, table: Sequence[Bucket], edges: EdgeFinder, source: int
) -> bool:
    """Write one picture's edges unless they are there; whether the picture could be read."""
    target = out / _name(source)
    if target.is_file():
        return True
    try:
        picture = open_rgb(images[source].path)
    except DataError:
        return False
    bucket = table[nearest(table, picture.height, picture.width)]
    found = edges(fit(picture, bucket).pixels)
    with replacing(target) as aside:
        Image.fromarray(found).save(aside, format="PNG")
    return True


def _name(source: int) -> str:
    return f"{source // _FOLDER_IMAGES:05d}/{source:08d}.png"
