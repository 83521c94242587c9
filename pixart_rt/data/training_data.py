"""Open a store or a folder of pictures as a training run's Source (loader.py)."""

from __future__ import annotations

from pathlib import Path

import torch

from pixart_rt.data.class_folder import open_images
from pixart_rt.data.control import ControlledSource
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.edges import EdgeFinder
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, usual_text_precision
from pixart_rt.data.loader import Source
from pixart_rt.data.manifest import MANIFEST
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError


def is_store(path: Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def open_data(
    path: Path,
    *,
    resolution: int,
    square: bool,
    encoder: str | None,
    device: torch.device,
    edges: EdgeFinder | None = None,
) -> Source:
    """Open what is at `path`: a feature store, or pictures that the model `encoder` encodes.

    All settings are of pictures, which have captions or classes; with a finder, edges too. Raises
    ConfigError for pictures without an encoder, DataError for a store that is not whole.
    """
    if is_store(path):
        return FeatureStore(path)
    if encoder is None:
        raise ConfigError(
            f"{path} is no feature store; make one with `pixart-rt data extract`, or encode its "
            "pictures in every step with `encoder=MODEL`"
        )
    config = EncoderConfig(model=encoder, text_precision=usual_text_precision(device))
    opened = FeatureEncoder.open(config, device)
    pictures = OnlineSource(open_images(path), opened, bucket_table(resolution, square=square))
    return pictures if edges is None else ControlledSource(pictures, edges)
