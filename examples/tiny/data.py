"""Draw scenes to pictures, and encode these into feature stores: the data of recipes/tiny.toml.

    python -m examples.tiny.data --out runs/tiny/data

    OUT/pictures/scenes-512/    metadata.jsonl and PNGs, or a subfolder of PNGs for each class
    OUT/features/scenes-512/    the feature store of them, as `pixart-rt data extract` makes it

For every phase of the recipe a set of `num_images` scenes, named after its data and resolution.
Scene i, where its things stand and what its caption says are functions of (seed, i). What was
stopped is resumed: pictures and shards are whole or absent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from examples.script import run_script
from examples.tiny.scenes import Scene, caption, draw, one_thing, only_one, place, random_scene
from pixart_rt.buckets import Bucket
from pixart_rt.cli.console import Steps
from pixart_rt.data.class_folder import open_images
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import METADATA
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import replacing
from pixart_rt.training.recipe import Recipe, read_recipe

RECIPE = Path("recipes/tiny.toml")
MODEL = "tiny"  # whose VAE and text encoder make the features
SCENE, PLACE, BUCKET, CAPTION = range(4)  # what random numbers are for
DRAWN = "scenes.json"  # what the pictures in a folder are of
FOLDER_IMAGES = 10_000  # in one subfolder of captioned pictures
ENCODED_PIXELS = 8 * 256 * 256  # at once

Progress = Callable[[str, int, int], None]


class Scenes(StrEnum):
    """What scenes show and what their captions say (scenes.py)."""

    CLASSES = "classes"
    """One object; its shape is the class, and there is no caption."""
    DENSE = "dense"
    """One to three objects; the caption names them all."""
    SPARSE = "sparse"
    """The same scenes; the caption names one of the objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSet:
    """A number of scenes, each in one of a resolution's buckets; all of the training side."""

    kind: Scenes
    count: int
    resolution: int
    square: bool
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.seed < 0:
            raise ConfigError(
                f"{self.count} scenes with seed {self.seed} cannot be drawn; use at least one, and "
                "a seed that is not negative"
            )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return bucket_table(self.resolution, square=self.square)

    def bucket(self, number: int) -> Bucket:
        """The size of a scene; all are as likely."""
        table = self.buckets
        return table[int(self._random(BUCKET, number).integers(len(table)))]

    def scene(self, number: int) -> Scene:
        make = one_thing if self.kind is Scenes.CLASSES else random_scene
        return make(self._random(SCENE, number), held_out=False)

    def caption(self, number: int) -> str:
        rng, scene = self._random(CAPTION, number), self.scene(number)
        return caption(only_one(scene, rng) if self.kind is Scenes.SPARSE else scene, rng)

    def image(self, number: int) -> npt.NDArray[np.uint8]:
        """[height, width, 3]."""
        scene, bucket = self.scene(number), self.bucket(number)
        shape = bucket.height, bucket.width
        pixels = draw(scene, place(scene, *shape, self._random(PLACE, number)), *shape)
        return (255 * pixels).round().clip(0, 255).astype(np.uint8)

    def file_name(self, number: int) -> str:
        """Of classes in their folder, and of captioned pictures a few thousand in one."""
        if self.kind is Scenes.CLASSES:
            return f"{self.scene(number).things[0].shape}/{number:08d}.png"
        return f"{number // FOLDER_IMAGES:05d}/{number:08d}.png"

    def _random(self, use: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, use, number])


def scene_sets(recipe: Recipe) -> dict[str, SceneSet]:
    """The sets that a recipe's phases train on. Raises ConfigError for two of the same name."""
    sets: dict[str, SceneSet] = {}
    for phase in recipe.phases:
        name = f"{phase.data}-{phase.resolution}"
        scenes = SceneSet(
            kind=Scenes.CLASSES if phase.of_classes else Scenes.DENSE,
            count=phase.num_images,
            resolution=phase.resolution,
            square=not phase.multi_scale,
        )
        if sets.setdefault(name, scenes) != scenes:
            raise ConfigError(
                f"phase {phase.name} trains on another {phase.data} of {phase.resolution} px than "
                "a phase before it; give its data a name of its own"
            )
    return sets


def draw_pictures(scenes: SceneSet, folder: Path, name: str, progress: Progress) -> None:
    """Draw what is missing in a folder. Raises DataError for one that holds something else."""
    told = json.dumps(asdict(scenes))
    record = folder / DRAWN
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        with replacing(record) as aside:
            aside.write_text(told, encoding="utf-8")
    elif not record.is_file() or record.read_text(encoding="utf-8") != told:
        raise DataError(f"{folder} holds something else than {told}; choose another folder")
    for number in range(scenes.count):
        progress(f"drawing {name}", number, scenes.count)
        path = folder / scenes.file_name(number)
        if not path.exists():
            with replacing(path) as aside:
                Image.fromarray(scenes.image(number)).save(aside, format="PNG")
    if scenes.kind is not Scenes.CLASSES:
        lines = (
            {"file_name": scenes.file_name(number), "text": scenes.caption(number)}
            for number in range(scenes.count)
        )
        with replacing(folder / METADATA) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def scene_store(
    scenes: SceneSet, out: Path, name: str, encoder: FeatureEncoder, progress: Progress
) -> FeatureStore:
    """Draw and encode what is missing of a set; return its store, OUT/features/NAME."""
    pictures, features = out / "pictures" / name, out / "features" / name
    draw_pictures(scenes, pictures, name, progress)
    config = ExtractConfig(
        resolution=scenes.resolution,
        square=scenes.square,
        batch=max(ENCODED_PIXELS // scenes.resolution**2, 1),
    )

    def show(step: str, done: int, total: int) -> None:
        progress(f"encoding {name}, {step}", done, total)

    images = open_images(pictures, classes=scenes.kind is Scenes.CLASSES)
    Extraction(images, features, encoder, config, MODEL).run(show)
    return FeatureStore(features)


def open_encoder(device: torch.device) -> FeatureEncoder:
    """The shipped VAE and text encoder, in float32."""
    return FeatureEncoder.open(EncoderConfig(model=MODEL), device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose data to make")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    encoder = open_encoder(torch.device(args.device))
    with Steps() as progress:
        for name, scenes in scene_sets(read_recipe(args.recipe)).items():
            store = scene_store(scenes, args.out, name, encoder, progress)
            print(f"{len(store)} samples in {store.path}", flush=True)


if __name__ == "__main__":
    run_script(main)
