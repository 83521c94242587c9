"""An ImageFolder of drawn pictures, and a store made of it with the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny.scenes import caption, draw, place, random_scene
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import METADATA, ImageFolder

SIZES = [(300, 300), (200, 401), (410, 203), (256, 256), (91, 350), (333, 250), (300, 301)]


def draw_pictures(root: Path, count: int, seed: int = 0) -> Path:
    """`count` scenes of awkward sizes (height, width) with their captions, as PNG and JPEG."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        scene = random_scene(rng)
        pixels = draw(scene, place(scene, height, width, rng), height, width)
        name = f"{number:04d}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray((pixels * 255).astype(np.uint8)).save(root / name)
        lines.append({"file_name": name, "text": caption(scene, rng), "other": f"picture {number}"})
    write_metadata(root, lines)
    return root


def write_metadata(root: Path, lines: list[dict[str, object]]) -> None:
    (root / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def sizes() -> list[tuple[int, int]]:
    """(height, width) of drawn pictures, which repeat."""
    return SIZES


@pytest.fixture(scope="session")
def draw_images() -> Callable[..., Path]:
    """draw_images(folder, count, seed=0): a new ImageFolder."""
    return draw_pictures


@pytest.fixture(scope="session")
def encoder() -> FeatureEncoder:
    return FeatureEncoder.open(EncoderConfig(model="tiny"), torch.device("cpu"))


@pytest.fixture
def extraction(encoder: FeatureEncoder) -> Callable[..., Extraction]:
    """extraction(images, store, **settings): not yet run."""

    def make(images: Path, store: Path, column: str = "text", **settings: object) -> Extraction:
        config = ExtractConfig(**{"shard_images": 5, "batch": 3, "threads": 2, **settings})
        return Extraction(ImageFolder(images, column), store, encoder, config, "tiny")

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures; tests that change files draw their own."""
    return draw_pictures(tmp_path_factory.mktemp("data") / "images", 12)


@pytest.fixture(scope="session")
def store(
    pictures: Path, encoder: FeatureEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Their complete store: three shards of five lines at most."""
    out = tmp_path_factory.mktemp("store") / "256"
    config = ExtractConfig(shard_images=5, batch=3, threads=2)
    assert Extraction(ImageFolder(pictures), out, encoder, config, "tiny").run().complete
    return out
