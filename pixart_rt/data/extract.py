"""Images and captions to a feature store, shard by shard.

A shard covers a fixed run of the metadata's lines and depends on nothing else. It is written
aside, waited for and renamed, so after a kill -9 at most the open shard is lost, and the same
command resumes with the shards that are missing. Several processes, on one or many GPUs, may run
the same command on the same folder: a lock on each shard, which dies with its process, divides the
work.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import save_file

from pixart_rt.buckets import Bucket
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.featurize import Featurizer
from pixart_rt.data.folder import Images
from pixart_rt.data.manifest import (
    CLASSES,
    EMPTY_PROMPT,
    FORMAT_VERSION,
    INDEX,
    LABELS,
    MANIFEST,
    ROW,
    SKIPPED,
    StoreManifest,
    shard_name,
)
from pixart_rt.data.shard import Skipped, read_shard, write_shard
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import locked, replacing
from pixart_rt.version import __version__

Progress = Callable[[str, int, int], None]  # name of the step, images done, images in all

LARGEST_SHARD = 65536  # images, whose features are all in memory at once
_LOCKS = ".locks"
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """How images become a store; what they are encoded with is in an EncoderConfig."""

    resolution: int = 256
    square: bool = False  # every image to the square bucket, as in the paper's 256 and 512 stages
    shard_images: int = 512  # lines of metadata
    batch: int = 8  # images of one bucket encoded together
    threads: int = 4  # that read and resize images

    def __post_init__(self) -> None:
        bucket_table(self.resolution, square=self.square)  # refuses what cannot be
        for name in ("shard_images", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.shard_images > LARGEST_SHARD:
            raise ConfigError(
                f"shards of {self.shard_images} images were requested; a shard is made in memory, "
                f"so use at most {LARGEST_SHARD}"
            )

    @property
    def table(self) -> tuple[Bucket, ...]:
        """The buckets that images are cut to."""
        return bucket_table(self.resolution, square=self.square)


class Extraction:
    """A store being made. Other processes may work on the same store."""

    def __init__(
        self,
        images: Images,
        store: Path,
        encoder: FeatureEncoder,
        config: ExtractConfig,
        model: str,
    ) -> None:
        self.images, self.store, self.encoder, self.config = images, Path(store), encoder, config
        self.featurize = Featurizer(
            images, encoder, config.table, batch=config.batch, threads=config.threads
        )
        self.manifest = _begin(images, encoder, config, model)

    def check_target(self) -> None:
        """Refuse a folder that holds something else, or a store of other images or encoders.

        Raises DataError. A store that was begun with the same is taken over.
        """
        refuse_other_folder(self.store)
        if not (self.store / MANIFEST).is_file():
            return
        found = StoreManifest.read(self.store)
        mine = self.manifest.identity
        changed = [name for name in mine if found.identity.get(name) != mine[name]]
        if changed:
            raise DataError(
                f"{self.store} was begun with another {', '.join(changed)}; continue it with the "
                "same images, model and options, or choose another OUT"
            )
        self.manifest = found

    def missing_shards(self) -> list[int]:
        """The shards that are not there yet."""
        present = set(os.listdir(self.store)) if self.store.is_dir() else set()
        return [n for n in range(self.manifest.num_shards) if shard_name(n) not in present]

    def _is_finished(self) -> bool:
        labelled = (LABELS, CLASSES) if self.images.classes else ()
        files = (INDEX, SKIPPED, EMPTY_PROMPT, *labelled)
        whole = all((self.store / name).is_file() for name in files)
        return self.manifest.complete and whole and not self.missing_shards()

    def sources(self, number: int) -> range:
        """The lines of metadata that a shard covers."""
        size = self.manifest.shard_images
        return range(number * size, min((number + 1) * size, self.manifest.num_images))

    def run(self, progress: Progress = lambda name, done, total: None) -> StoreManifest:
        """Make what is missing. The manifest returned is not complete if others still work on it.

        Raises DataError as check_target does, and where half precision overflowed.
        """
        self.check_target()
        missing = self.missing_shards()
        if self._is_finished():
            return self.manifest
        if not (self.store / MANIFEST).is_file():
            self.manifest.write(self.store)
        (self.store / _LOCKS).mkdir(exist_ok=True)
        total, done, made = sum(len(self.sources(n)) for n in missing), 0, 0
        for number in missing:
            with locked(self.store / _LOCKS / shard_name(number)) as mine:
                if mine and not (self.store / shard_name(number)).exists():
                    self._make(number, done, total, progress)
                    made += 1
            done += len(self.sources(number))
        with locked(self.store / _LOCKS / MANIFEST, wait=True):
            self.manifest = StoreManifest.read(self.store)
            if not self.missing_shards() and (made or not self._is_finished()):
                self._complete(progress)
        return self.manifest

    def _make(self, number: int, done: int, total: int, progress: Progress) -> None:
        name = f"shard {number + 1} of {self.manifest.num_shards}"
        progress(name, done, total)

        def advance() -> None:
            nonlocal done
            done += 1
            progress(name, done, total)

        records, skipped = self.featurize(self.sources(number), advance)
        aside = self.store / f".{shard_name(number)}.part"  # ours alone, by the lock
        write_shard(aside, records, skipped)
        os.replace(aside, self.store / shard_name(number))
        _sync_folder(self.store)

    def _complete(self, progress: Progress) -> None:
        """Join the shards' rows to one index, list what was skipped, and say so in the manifest."""
        shards, rows, skipped = [], [], []
        for number in range(self.manifest.num_shards):
            progress("joining the shards", number, self.manifest.num_shards)
            path = self.store / shard_name(number)
            found, left_out = read_shard(path)
            found["shard"] = number
            rows.append(found)
            skipped += left_out
            shards.append({"samples": len(found), "bytes": path.stat().st_size})
        index = np.concatenate([np.zeros(0, ROW), *rows])
        if not len(index):
            raise DataError(f"none of the {len(skipped)} images could be read: {skipped[0].reason}")
        with replacing(self.store / INDEX) as aside, aside.open("wb") as file:
            np.save(file, index, allow_pickle=False)
        with replacing(self.store / SKIPPED) as aside:
            aside.write_text("".join(_line(each) for each in skipped), encoding="utf-8")
        with replacing(self.store / EMPTY_PROMPT) as aside:
            save_file({"prompt_embeds": self.encoder.text([""])[0][0].contiguous()}, aside)
            aside.chmod(0o644)  # safetensors writes private files
        if self.images.classes:
            self._write_labels(index)
        self.manifest = replace(self.manifest, complete=True, num_samples=len(index), shards=shards)
        self.manifest.write(self.store)

    def _write_labels(self, index: npt.NDArray[np.void]) -> None:
        """The class of every sample, found by its place among the images: some were skipped."""
        labels = np.array([self.images[int(source)].label for source in index["source"]], np.int64)
        with replacing(self.store / LABELS) as aside, aside.open("wb") as file:
            np.save(file, labels, allow_pickle=False)
        with replacing(self.store / CLASSES) as aside:
            aside.write_text(
                json.dumps(self.images.classes, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def _begin(
    images: Images, encoder: FeatureEncoder, config: ExtractConfig, model: str
) -> StoreManifest:
    """The manifest of a store that has no shard yet."""
    identity = {
        "store_format": FORMAT_VERSION,
        "images": images.digest(),
        "caption_column": images.caption_column,
        "resolution": config.resolution,
        "square": config.square,
        "shard_images": config.shard_images,
        "max_text_tokens": encoder.max_text_tokens,
        **encoder.identity,
    }
    if images.classes:
        identity["num_classes"] = len(images.classes)
    return StoreManifest(
        pixart_rt_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        identity=identity,
        model=model,
        resolution=config.resolution,
        buckets=[[bucket.ratio, bucket.height, bucket.width] for bucket in config.table],
        latent_channels=encoder.latent_channels,
        scaling_factor=encoder.scaling_factor,
        max_text_tokens=encoder.max_text_tokens,
        text_width=encoder.text_width,
        num_images=len(images),
        shard_images=config.shard_images,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    )


def refuse_other_folder(store: Path) -> None:
    """DataError for a folder that is neither a feature store, nor empty."""
    if (store / MANIFEST).is_file():
        StoreManifest.read(store)  # also other programs' folders have a manifest.json
    elif store.exists() and not _is_free(store):
        raise DataError(f"{store} exists and is no feature store; choose another OUT")


def _is_free(store: Path) -> bool:
    """An empty folder; hidden files may be what a killed process left."""
    return store.is_dir() and all(path.name.startswith(".") for path in store.iterdir())


def _sync_folder(folder: Path) -> None:
    """Wait until a rename inside the folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(skipped: Skipped) -> str:
    record = {
        "line": skipped.source + 1,
        "file_name": skipped.file_name,
        "reason": skipped.reason,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
