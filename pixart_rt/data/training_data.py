"""A store or a folder of pictures as what a trainer takes (the Source of training/phases.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket, buckets
from pixart_rt.data.class_folder import open_images
from pixart_rt.data.control import PairedSource
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.loading import Batches
from pixart_rt.data.manifest import MANIFEST
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore


class TrainingData:
    """Samples, T5("") and a name for them; workers and pinning are the DataLoader's."""

    def __init__(
        self,
        source: FeatureStore | OnlineSource | PairedSource,
        empty_prompt: Tensor,
        identity: str,
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.source, self.empty_prompt, self.identity = source, empty_prompt, identity
        self.workers, self.pin = workers, pin

    def __len__(self) -> int:
        return len(self.source)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.source.buckets

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        return self.source.bucket_of

    def feed(self, ids: Callable[[int], Sequence[int]], seed: int) -> Batches:
        """The batches of the samples that `ids` gives for a step."""
        return Batches(self.source, ids, seed=seed, workers=self.workers, pin=self.pin)


def is_store(path: Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def stored(path: Path, *, workers: int = 0, pin: bool = False) -> TrainingData:
    """A feature store. Raises DataError for one that is not whole."""
    store = FeatureStore(path)
    identity = _digest(store.manifest.identity)
    return TrainingData(store, store.empty_prompt, identity, workers=workers, pin=pin)


def paired(images: Path, controls: Path, *, workers: int = 0, pin: bool = False) -> TrainingData:
    """A store of images and one of their edges. Raises DataError where they do not belong."""
    store, edges = FeatureStore(images), FeatureStore(controls)
    identity = _digest({"images": store.manifest.identity, "edges": edges.manifest.identity})
    source = PairedSource(store, edges)
    return TrainingData(source, store.empty_prompt, identity, workers=workers, pin=pin)


def encoded_online(
    path: Path,
    encoder: FeatureEncoder,
    resolution: int,
    *,
    square: bool,
    workers: int = 0,
) -> TrainingData:
    """A folder of pictures with captions or of classes, encoded anew in every step."""
    images = open_images(path)
    table = buckets(resolution)
    if square:
        table = tuple(each for each in table if each.height == each.width)
    source = OnlineSource(images, encoder, table)
    (empty,), _ = encoder.text([""])
    identity = _digest({"images": images.digest(), **encoder.identity})
    return TrainingData(source, torch.as_tensor(empty), identity, workers=workers)


def _digest(identity: dict[str, object]) -> str:
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
