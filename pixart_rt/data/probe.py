"""What an extraction will cost, from the real work done on a few images of the data set.

The images are spread evenly over the metadata. They are encoded in smaller batches than a whole
shard's, so on a GPU the prediction is on the slow side; the first batch warms up and is not timed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixart_rt.data.extract import Extraction
from pixart_rt.data.planner import HOUR, duration, encoder_flops, size
from pixart_rt.data.shard import Record, write_shard
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import workplace

LARGEST_WRITE = 64e6  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """An extraction before it starts. Rates are of this machine, measured."""

    resolution: int
    images: int  # lines of metadata
    images_left: int  # of them, in shards that are not there yet
    shards: int
    probed: int  # images the rates were measured on
    skipped: int  # of them, unreadable
    bytes_per_image: float  # in the store
    vae_per_second: float  # images through the VAE's encoder
    text_per_second: float  # captions through the text encoder
    read_per_second: float  # images read and resized, all threads together
    write_bytes_per_second: float  # of shards, waited for
    images_per_second: float  # all of it together
    flops_per_image: float  # of both encoders, on a square image and a caption of mean length
    free_bytes: int  # where the store will be

    @property
    def store_bytes(self) -> float:
        """Of the part that is left."""
        return self.images_left * self.bytes_per_image

    @property
    def hours(self) -> float:
        """Of one process, for the part that is left."""
        return self.images_left / self.images_per_second / HOUR

    def lines(self) -> list[str]:
        """The plan in words."""
        done = self.images - self.images_left
        rest = f", {done} of them done" if done else ""
        lines = [
            f"images: {self.images}{rest}; {self.shards} shards",
            f"store: {size(self.store_bytes)} to write ({size(self.bytes_per_image)} an image), "
            f"{size(self.free_bytes)} free",
            f"time: {duration(self.hours * HOUR)} in one process, at "
            f"{self.images_per_second:.3g} images/s (VAE {self.vae_per_second:.3g}/s, text "
            f"{self.text_per_second:.3g}/s, reading {self.read_per_second:.3g}/s), measured on "
            f"{self.probed} images",
        ]
        if self.skipped:
            lines.append(f"unreadable: {self.skipped} of the {self.probed + self.skipped} probed")
        if self.store_bytes > self.free_bytes:
            lines.append("warning: the store will not fit on this disk")
        return lines


def make_plan(extraction: Extraction, num_probed: int = 32) -> ExtractionPlan:
    """Encode about `num_probed` images spread over the data set and predict the rest.

    Writes nothing into the store. Raises DataError if none of them can be read.
    """
    if num_probed < 1:
        raise ConfigError(f"a probe of {num_probed} images was requested; it needs at least one")
    extraction.check_target()
    total = extraction.manifest.num_images
    sources = np.unique(np.linspace(0, total - 1, min(num_probed, total)).astype(int)).tolist()
    featurize, clock = extraction.featurize, extraction.encoder.clock
    featurize(sources[: extraction.config.batch])  # first calls choose algorithms and take memory
    clock.seconds.clear()
    featurize.image_seconds = 0.0
    start = time.perf_counter()
    records, skipped = featurize(sources)
    encoding = time.perf_counter() - start
    if not records:
        raise DataError(f"none of {len(skipped)} probed images can be read: {skipped[0].reason}")
    place = _existing_parent(extraction.store)
    written, writing = _write_once(records, place, extraction.config.shard_images)
    count = len(records)
    return ExtractionPlan(
        resolution=extraction.manifest.resolution,
        images=total,
        images_left=sum(len(extraction.sources(n)) for n in extraction.missing_shards()),
        shards=extraction.manifest.num_shards,
        probed=count,
        skipped=len(skipped),
        bytes_per_image=written,
        vae_per_second=count / clock.seconds["vae"],
        text_per_second=count / clock.seconds["text"],
        read_per_second=count * featurize.threads / featurize.image_seconds,
        write_bytes_per_second=written / writing,
        images_per_second=1 / (encoding / count + writing),
        flops_per_image=_flops(extraction, records),
        free_bytes=shutil.disk_usage(place).free,
    )


def _write_once(records: list[Record], place: Path, shard_images: int) -> tuple[float, float]:
    """Bytes and seconds an image of writing a shard, or LARGEST_WRITE of it, and removing it."""
    bytes_each = sum(len(r.latents) + len(r.prompt_embeds) for r in records) / len(records)
    count = max(1, min(shard_images, int(LARGEST_WRITE / bytes_each)))
    many = (records * -(-count // len(records)))[:count]  # few bytes would time the disk's latency
    with workplace(place) as folder:
        path = folder / "probe.parquet"
        start = time.perf_counter()
        write_shard(path, many, [])
        seconds = time.perf_counter() - start
        return path.stat().st_size / count, seconds / count


def _flops(extraction: Extraction, records: Sequence[Record]) -> float:
    """Of both encoders on one image."""
    encoder = extraction.encoder
    tokens = round(sum(record.num_tokens for record in records) / len(records))
    return sum(
        encoder_flops(
            dict(encoder.vae.config), encoder.text_encoder.config,
            extraction.manifest.resolution, tokens,
        )
    )  # fmt: skip


def _existing_parent(path: Path) -> Path:
    return next(each for each in (path, *path.resolve().parents) if each.is_dir())
