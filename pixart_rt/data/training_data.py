"""A store or a folder of pictures as a trainer takes it: Source of training/sample_source.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket, buckets
from pixart_rt.data.class_folder import open_images
from pixart_rt.data.control import ControlledSource, PairedSource
from pixart_rt.data.edges import EdgeFinder
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, usual_text_precision
from pixart_rt.data.loader import Batches, FeatureSource
from pixart_rt.data.manifest import MANIFEST
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError


class TrainingData:
    """Samples, T5("") and a name for them; workers and pinning are the DataLoader's."""

    def __init__(
        self,
        source: FeatureSource,
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

    def feed(self, ids: Callable[[int], Iterable[int]], seed: int) -> Batches:
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
    edges: EdgeFinder | None = None,
) -> TrainingData:
    """A folder of pictures with captions or of classes, encoded anew in every step; with a finder,
    their edges too."""
    images = open_images(path)
    table = buckets(resolution)
    if square:
        table = tuple(each for each in table if each.height == each.width)
    source = OnlineSource(images, encoder, table)
    (empty,), _ = encoder.text([""])
    named: dict[str, object] = {"images": images.digest(), **encoder.identity}
    if edges is None:
        return TrainingData(source, torch.as_tensor(empty), _digest(named), workers=workers)
    identity = _digest({**named, "edges": repr(edges)})
    controlled = ControlledSource(source, edges)
    return TrainingData(controlled, torch.as_tensor(empty), identity, workers=workers)


def open_data(
    path: Path,
    *,
    resolution: int,
    square: bool,
    encoder: str | None,
    device: torch.device,
    workers: int,
    edges: EdgeFinder | None = None,
) -> TrainingData:
    """What is at `path`: a feature store, or pictures that the model `encoder` encodes.

    The last three settings are of pictures. Raises ConfigError for pictures without an encoder.
    """
    if is_store(path):
        return stored(path, workers=workers, pin=device.type == "cuda")
    if encoder is None:
        raise ConfigError(
            f"{path} is no feature store; make one with `pixart-rt data extract`, or encode its "
            "pictures in every step with `encoder=MODEL`"
        )
    config = EncoderConfig(model=encoder, text_precision=usual_text_precision(device))
    opened = FeatureEncoder.open(config, device)
    return encoded_online(path, opened, resolution, square=square, workers=workers, edges=edges)


def _digest(identity: dict[str, object]) -> str:
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
