"""Drawn scenes as training data: the right pictures and captions, whole files, features of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny.data import (
    RECIPE,
    Scenes,
    SceneSet,
    draw_pictures,
    open_encoder,
    scene_sets,
    scene_store,
)
from examples.tiny.scenes import SHAPES, caption
from pixart_rt.buckets import buckets
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.data.class_folder import open_images
from pixart_rt.data.crop import open_rgb
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.model.vae import VaeEncoder, read_vae
from pixart_rt.training.progress import silent
from pixart_rt.training.recipe import read_recipe

ROOT = Path(__file__).parents[3]
SMALL = SceneSet(kind=Scenes.DENSE, count=7, resolution=32, square=True)
CLASSES = dataclasses.replace(SMALL, kind=Scenes.CLASSES, count=16)
SPARSE = dataclasses.replace(SMALL, kind=Scenes.SPARSE)


@pytest.fixture(scope="module")
def encoder():
    return open_encoder(torch.device("cpu"))


def drawn(scenes, folder):
    draw_pictures(scenes, folder, "some", silent)
    return open_images(folder)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


def test_features_are_those_of_the_scenes(encoder, tmp_path):
    """Oracle: the scene drawn and encoded alone. A store rounds to float16, pictures to 8 bits."""
    scenes = dataclasses.replace(SMALL, resolution=256, square=False, count=3)
    store = scene_store(scenes, tmp_path, "some", encoder, silent)
    vae = VaeEncoder(read_vae(TINY / "vae"))
    assert store.buckets == buckets(256) and len(store) == 3
    for number in range(3):
        bucket, image = scenes.bucket(number), torch.from_numpy(scenes.image(number))
        assert store.buckets[store.bucket_of[number]] == bucket
        assert store.original_size(number) == (bucket.height, bucket.width) == image.shape[:2]
        with torch.no_grad():
            expected = vae(image.permute(2, 0, 1)[None] / 127.5 - 1)[0]
        found = store.moments(number)[0].float() * store.manifest.scaling_factor
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
        (text,), _ = encoder.text([scenes.caption(number)])
        torch.testing.assert_close(store.text(number), text, atol=2e-2, rtol=2e-2)


def test_pictures_are_the_scenes_at_their_buckets_sizes(tmp_path):
    scenes = dataclasses.replace(SMALL, resolution=256, square=False, count=5)
    images = drawn(scenes, tmp_path / "pictures")
    assert len({scenes.bucket(number) for number in range(100)}) > 30
    for number in range(5):
        entry = images[number]
        assert entry.caption == scenes.caption(number)
        assert np.array_equal(np.asarray(open_rgb(entry.path)), scenes.image(number))
    assert all(not scenes.scene(number).held_out() for number in range(200))


def test_what_was_stopped_is_resumed(encoder, tmp_path):
    """What is there is not written again; the result is that of a run that nobody stopped."""
    whole = scene_store(SMALL, tmp_path / "whole", "some", encoder, silent)
    stop = KeyboardInterrupt

    def stops(name, done, total):
        if done == 3 or "encoding" in name:
            raise stop

    def encoding_stops(name, done, total):
        if "encoding" in name:
            raise stop

    with pytest.raises(stop):
        scene_store(SMALL, tmp_path / "parts", "some", encoder, stops)
    written = files(tmp_path / "parts")
    assert len(written) == 1 + 3, "what is drawn, and three pictures"
    with pytest.raises(stop):
        scene_store(SMALL, tmp_path / "parts", "some", encoder, encoding_stops)
    parts = scene_store(SMALL, tmp_path / "parts", "some", encoder, silent)
    assert written.items() <= files(tmp_path / "parts").items()
    assert parts.identity == whole.identity
    assert all(torch.equal(parts.moments(n), whole.moments(n)) for n in range(SMALL.count))
    before = files(parts.path)
    assert (
        scene_store(SMALL, tmp_path / "parts", "some", encoder, silent).identity == whole.identity
    )
    assert files(parts.path) == before


def test_a_caption_is_one_of_its_scenes(tmp_path):
    said = {number: SMALL.caption(number) for number in range(SMALL.count)}
    for number, text in said.items():
        scene = SMALL.scene(number)
        assert text in {caption(scene, np.random.default_rng(k)) for k in range(300)}
        assert text == SMALL.caption(number), "the same again"
    other = dataclasses.replace(SMALL, seed=1)
    assert said != {number: other.caption(number) for number in range(SMALL.count)}


def test_sparse_captions_name_one_thing_of_the_same_scene(tmp_path):
    dense, sparse = drawn(SMALL, tmp_path / "dense"), drawn(SPARSE, tmp_path / "sparse")
    assert dense.digest() != sparse.digest()
    for number in range(SMALL.count):
        assert dense[number].path.read_bytes() == sparse[number].path.read_bytes()
        things, text = SMALL.scene(number).things, sparse[number].caption
        assert sum(text.count(shape) for shape in SHAPES) == 1
        assert any(f"{each.color} {each.shape}" in text for each in things)


def test_classes_are_shapes(encoder, tmp_path):
    store = scene_store(CLASSES, tmp_path, "some", encoder, silent)
    assert store.classes == tuple(sorted(SHAPES))
    shapes = [CLASSES.scene(number).things[0].shape for number in range(CLASSES.count)]
    assert all(len(CLASSES.scene(number).things) == 1 for number in range(CLASSES.count))
    images = open_images(tmp_path / "pictures" / "some")
    for sample, source in enumerate(store.sources):
        number = int(images[int(source)].path.stem)
        assert store.classes[store.labels[sample]] == shapes[number]
    batch = store.load([0, 1], seed=0, step=0)
    torch.testing.assert_close(batch.prompt_embeds[0], store.empty_prompt, atol=2e-2, rtol=2e-2)


def test_the_sets_of_the_recipe():
    sets = scene_sets(read_recipe(ROOT / RECIPE))
    assert list(sets) == ["classes-256", "squares-256", "scenes-256", "scenes-512", "scenes-1024"]
    assert [len(each.buckets) for each in sets.values()] == [1, 1, 40, 40, 40]
    kinds = [each.kind for each in sets.values()]
    assert kinds == [Scenes.CLASSES, *[Scenes.DENSE] * 4]
    assert [each.count for each in sets.values()] == [4000, 12_000, 12_000, 3000, 800]


def test_two_sets_of_one_name_are_refused():
    recipe = read_recipe(ROOT / RECIPE)
    phases = [dataclasses.replace(each, data="scenes") for each in recipe.phases[1:]]
    with pytest.raises(ConfigError, match="give its data a name of its own"):
        scene_sets(dataclasses.replace(recipe, phases=(recipe.phases[0], *phases)))


def test_no_scenes_are_refused():
    with pytest.raises(ConfigError, match="0 scenes"):
        dataclasses.replace(SMALL, count=0)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"count": 8}, {"resolution": 48}, {"kind": Scenes.SPARSE}]
)
def test_a_folder_keeps_its_set(change, tmp_path):
    drawn(SMALL, tmp_path / "pictures")
    with pytest.raises(DataError, match="holds something else"):
        drawn(dataclasses.replace(SMALL, **change), tmp_path / "pictures")


def test_a_strangers_folder_is_not_drawn_into(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": "x"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="choose another folder"):
        drawn(SMALL, tmp_path)
    assert len(files(tmp_path)) == 2
