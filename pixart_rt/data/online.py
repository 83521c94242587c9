"""Images encoded while training: a Source (loader.py) without a store.

`load` reads and crops pictures, on the CPU, in DataLoader workers; `finish` runs the encoders in
the process that trains. Both sources draw the same latents for the same (seed, step, sample), but
for the rounding to float16 that a store does, as long as no picture had to be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.data.batch import Batch, draw_noise
from pixart_rt.data.crop import fit, nearest, open_rgb, read_size
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.folder import Images
from pixart_rt.data.loader import identity_of
from pixart_rt.data.sample import pad_text
from pixart_rt.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """A step's pictures before they are encoded; what a worker hands over."""

    ids: list[int]
    pixels: npt.NDArray[np.uint8]  # [B, H, W, 3]
    captions: list[str]
    labels: Tensor | None  # [B] int64, where the images have classes
    original_size: Tensor  # [B, 2] float32
    bucket: Bucket
    seed: int
    step: int


class OnlineSource:
    """Pictures of an ImageFolder or ClassFolder, encoded anew at every use.

    Every picture's header is read first, in `threads`; what has none is left out and listed in
    `skipped` as (line of the metadata from 0, reason). A picture whose header is sound and whose
    pixels are not stops the run with a DataError: a step cannot do without its samples.
    """

    def __init__(
        self,
        images: Images,
        encoder: FeatureEncoder,
        table: Sequence[Bucket],
        *,
        threads: int = 4,
    ) -> None:
        self.images, self.buckets = images, tuple(table)
        self.encoder: FeatureEncoder | None = encoder
        self.skipped: list[tuple[int, str]] = []
        self.bucket_of, self._sources = self._scan(threads)
        (self.empty_prompt,), _ = encoder.text([""])
        self.about = {"images": images.digest(), **encoder.identity}

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def identity(self) -> str:
        """Changes with the pictures and the encoders."""
        return identity_of(self.about)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which has no use for the encoders."""
        return {**self.__dict__, "encoder": None}

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Pictures:
        """The pictures of a step, all of one bucket. Raises DataError for one that is damaged."""
        found = {int(self.bucket_of[sample]) for sample in ids}
        if len(found) != 1:
            raise ConfigError(f"a batch is of one bucket, these samples are of {sorted(found)}")
        bucket = self.buckets[found.pop()]
        entries = [self.images[int(self._sources[sample])] for sample in ids]
        fitted = [fit(open_rgb(entry.path), bucket) for entry in entries]
        return Pictures(
            ids=[int(sample) for sample in ids],
            pixels=np.stack([each.pixels for each in fitted]),
            captions=[entry.caption for entry in entries],
            labels=torch.tensor([entry.label for entry in entries])
            if self.images.classes
            else None,
            original_size=torch.tensor([each.original_size for each in fitted]).float(),
            bucket=bucket,
            seed=seed,
            step=step,
        )

    def finish(self, loaded: Pictures) -> Batch:
        """Encode what `load` read, in the process that holds the encoders."""
        assert self.encoder is not None, "a worker process cannot encode"
        moments = self.encoder.moments(list(loaded.pixels))
        noise = draw_noise(loaded.seed, loaded.step, loaded.ids, moments.shape[2:])
        features, _ = self.encoder.text(loaded.captions)
        padded = self.encoder.max_text_tokens if loaded.labels is None else len(features[0])
        embeds, mask = pad_text(features, padded)
        return Batch(
            ids=torch.tensor(loaded.ids),
            latents=(moments[:, 0] + moments[:, 1] * noise) * self.encoder.scaling_factor,
            prompt_embeds=embeds,
            prompt_mask=mask,
            original_size=loaded.original_size,
            aspect_ratio=torch.full((len(loaded.ids), 1), loaded.bucket.ratio),
            bucket=loaded.bucket,
            labels=loaded.labels,
        )

    def _scan(self, threads: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The bucket of every usable picture, and its place in the metadata; both [samples]."""
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(self._bucket, range(len(self.images))))
        usable = [(source, bucket) for source, bucket in enumerate(found) if bucket is not None]
        self.skipped.sort()
        if not usable:
            raise DataError(f"{self.images.root} has no picture that can be read")
        sources, owners = zip(*usable, strict=True)
        return np.array(owners, np.uint8), np.array(sources, np.int64)

    def _bucket(self, source: int) -> int | None:
        try:
            return nearest(self.buckets, *read_size(self.images[source].path))
        except DataError as error:
            self.skipped.append((source, str(error)))
            return None
