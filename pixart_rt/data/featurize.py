"""A run of images and captions to records: read in threads, fitted to buckets, encoded in batches.

Images are encoded with others of their bucket, captions with others of their length; the records
come back in the order of the metadata. What cannot be read is reported and left out.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.data.crop import Fitted, fit, nearest, open_rgb
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.folder import Entry, Images
from pixart_rt.data.sample import bfloat16_to_bytes
from pixart_rt.data.shard import Record, Skipped
from pixart_rt.errors import DataError

TEXT_BATCH = 32  # captions of like length encoded together
_AHEAD = 4  # images read ahead of the encoder, per thread


@dataclass(frozen=True, slots=True)
class Loaded:
    """A picture that was read, and the caption it goes with."""

    source: int
    entry: Entry
    bucket: int
    fitted: Fitted


class Featurizer:
    """Turns images of a data set, by their places in it, into records.

    batch: images of one bucket encoded together. threads: that read and resize images.
    `image_seconds` adds up the threads' time.
    """

    def __init__(
        self,
        images: Images,
        encoder: FeatureEncoder,
        table: Sequence[Bucket],
        *,
        batch: int,
        threads: int,
    ) -> None:
        self.images, self.encoder, self.table = images, encoder, tuple(table)
        self.batch, self.threads = batch, threads
        self.image_seconds = 0.0
        self._adding = threading.Lock()

    def __call__(
        self, sources: Sequence[int], advance: Callable[[], None] = lambda: None
    ) -> tuple[list[Record], list[Skipped]]:
        """Records of these lines in order, and what was skipped; `advance` is called per image.

        Raises DataError where half precision overflowed, and the system's own errors.
        """
        waiting: dict[int, list[Loaded]] = defaultdict(list)
        done: list[tuple[Loaded, bytes]] = []
        skipped = []
        for found in self._read_ahead(sources):
            advance()
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            waiting[found.bucket].append(found)
            if len(waiting[found.bucket]) == self.batch:
                done += self._latents(waiting.pop(found.bucket))
        for group in waiting.values():
            done += self._latents(group)
        return self._with_text(done), skipped

    def _read_ahead(self, sources: Sequence[int]) -> Iterator[Loaded | Skipped]:
        """In order, a bounded number of images ahead."""
        with ThreadPoolExecutor(self.threads) as pool:
            running: deque[Future[Loaded | Skipped]] = deque()
            try:
                for source in sources:
                    running.append(pool.submit(self._read, source))
                    if len(running) > _AHEAD * self.threads:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def _read(self, source: int) -> Loaded | Skipped:
        start = time.perf_counter()
        file_name = None
        try:
            entry = self.images[source]
            file_name = entry.file_name
            image = open_rgb(entry.path)
        except DataError as error:
            return Skipped(source, file_name, str(error))
        bucket = nearest(self.table, image.height, image.width)
        fitted = fit(image, self.table[bucket])
        with self._adding:
            self.image_seconds += time.perf_counter() - start
        return Loaded(source, entry, bucket, fitted)

    def _latents(self, group: list[Loaded]) -> list[tuple[Loaded, bytes]]:
        """Each picture's moments as bytes; the pixels are freed."""
        moments = self.encoder.moments([each.fitted.pixels for each in group])
        nothing = np.empty((0, 0, 3), np.uint8)
        return [
            (
                Loaded(each.source, each.entry, each.bucket,
                       Fitted(nothing, each.fitted.original_size, each.fitted.crop)),
                _float16(values, each.entry.file_name),
            )
            for each, values in zip(group, moments, strict=True)
        ]  # fmt: skip

    def _with_text(self, done: list[tuple[Loaded, bytes]]) -> list[Record]:
        done = sorted(done, key=lambda pair: len(pair[0].entry.caption))
        records = []
        for start in range(0, len(done), TEXT_BATCH):
            group = done[start : start + TEXT_BATCH]
            features, cuts = self.encoder.text([each.entry.caption for each, _ in group])
            records += [
                Record(
                    file_name=each.entry.file_name,
                    source=each.source,
                    caption=each.entry.caption,
                    num_tokens=len(feature),
                    num_tokens_cut=cut,
                    bucket=each.bucket,
                    size=(self.table[each.bucket].height, self.table[each.bucket].width),
                    original_size=each.fitted.original_size,
                    crop=each.fitted.crop,
                    latents=latents,
                    prompt_embeds=bfloat16_to_bytes(feature),
                )
                for (each, latents), feature, cut in zip(group, features, cuts, strict=True)
            ]
        return sorted(records, key=lambda record: record.source)


def _float16(moments: Tensor, name: str) -> bytes:
    """[2, C, h, w] as little-endian float16. Raises DataError beyond its range, 65504."""
    half = moments.half()
    if not half.isfinite().all():
        raise DataError(f"{name}: the latents reach {float(moments.abs().max()):.3g}, beyond fp16")
    return half.numpy().astype("<f2", copy=False).tobytes()
