"""What a feature store says about itself.

store/
  manifest.json            this; `complete` is false until the last shard is written
  shard-00000.parquet ...  features, in the order of the images' metadata
  index.npy                where each sample lies (ROW), for reading without Parquet
  empty_prompt.safetensors T5(""), [n, E] bfloat16: what dropped captions become
  skipped.jsonl            images that could not be read, and why
  labels.npy, classes.json the samples' classes, where the images had some instead of captions
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixart_rt.buckets import Bucket
from pixart_rt.errors import DataError
from pixart_rt.files import read_json, replacing
from pixart_rt.typed import check_types

FORMAT_VERSION = 1
MANIFEST, INDEX, SKIPPED = "manifest.json", "index.npy", "skipped.jsonl"
EMPTY_PROMPT = "empty_prompt.safetensors"
LABELS, CLASSES = "labels.npy", "classes.json"  # [num_samples] int64; their names in order

ROW = np.dtype(
    [
        ("source", "<i8"),  # the image's place in the metadata, from 0
        ("shard", "<u4"),
        ("latents_at", "<u8"),  # byte offsets in the shard's file
        ("text_at", "<u8"),
        ("num_tokens", "<u2"),
        ("bucket", "u1"),  # index into the manifest's buckets
        ("original_size", "<u4", (2,)),  # height, width
        ("crop", "<f4", (4,)),  # top, left, height, width
        ("checksum", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreManifest:
    """The identity, the shape and, when complete, the contents of a store."""

    format_version: int = FORMAT_VERSION
    pixart_rt_version: str
    created: str  # ISO 8601, UTC
    identity: dict[str, Any]  # all that the features depend on; a restart must have the same
    model: str  # as the user named it
    resolution: int
    buckets: list[list[float]]  # [height / width, height, width]
    latent_channels: int
    scaling_factor: float
    max_text_tokens: int
    text_width: int
    num_images: int  # lines of metadata
    shard_images: int  # lines of metadata a shard covers
    versions: dict[str, str]
    complete: bool = False
    num_samples: int = 0  # images that could be read
    shards: list[dict[str, int]] = field(default_factory=list)  # {"samples", "bytes"} in order

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_images)

    @property
    def num_classes(self) -> int:
        """0 for a store of captions; such an identity says nothing of classes."""
        return int(self.identity.get("num_classes", 0))

    @property
    def bucket_table(self) -> tuple[Bucket, ...]:
        return tuple(
            Bucket(ratio=ratio, height=int(height), width=int(width))
            for ratio, height, width in self.buckets
        )

    def check(self) -> None:
        """TypeError or ValueError for values that no store has."""
        check_types(self)
        sizes = (self.latent_channels, self.max_text_tokens, self.text_width, self.shard_images)
        if min(sizes) < 1 or max(sizes) > 2**24 or min(self.num_images, self.num_samples) < 0:
            raise ValueError(f"it says sizes {sizes} of {self.num_images} images")
        if any(len(row) != 3 or min(row) <= 0 or max(row) > 2**14 for row in self.buckets):
            raise ValueError("a bucket is no ratio, height and width")
        if not 0 <= self.num_classes <= 2**24:
            raise ValueError(f"num_classes is {self.num_classes}")

    def write(self, store: Path) -> None:
        with replacing(Path(store) / MANIFEST) as temporary:
            temporary.write_text(
                json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )

    @classmethod
    def read(cls, store: Path) -> StoreManifest:
        """The manifest of a store, or a DataError that says what is wrong with the folder."""
        path = Path(store) / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{store} is no feature store: it has no {MANIFEST}; make one with "
                f"`pixart-rt data extract IMAGES {store}`"
            )
        try:
            values = read_json(path)
            version = values.get("format_version")
            manifest = cls(**values) if version == FORMAT_VERSION else None
            if manifest is not None:
                manifest.check()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); extract the store again") from error
        if manifest is None:
            raise DataError(
                f"{store} has store format {version}, this pixart_rt reads format "
                f"{FORMAT_VERSION}; extract it again"
            )
        return manifest


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"
