"""The scorer reads drawn scenes back; captions, split and shapes are what they claim.

Oracle: the scene a picture was drawn from.
"""

import numpy as np
import pytest

from examples.tiny.scenes import (
    BACKGROUNDS,
    PALETTE,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw,
    place,
    random_scene,
)
from examples.tiny.scorer import connected_components, find, score
from pixart_rt.buckets import buckets

SQUARES = [(128, 128), (256, 256), (512, 512), (1024, 1024)]
QUARTERS = [(bucket.height, bucket.width) for bucket in buckets(256)]  # all 40 aspect ratios
LARGE = [(512, 2048), (2048, 512), (832, 1216), (352, 704)]


def shares(sizes: list[tuple[int, int]], count: int, shuffled: bool = False) -> tuple[float, float]:
    """(objects right, objects right and placed) of `count` drawn scenes over the sizes."""
    rng = np.random.default_rng(7)
    asked = right = placed = 0
    for index in range(count):
        scene = random_scene(rng)
        height, width = sizes[index % len(sizes)]
        image = draw(scene, place(scene, height, width, rng), height, width)
        result = score(image, random_scene(rng) if shuffled else scene)
        asked, right, placed = asked + result.asked, right + result.right, placed + result.placed
    return right / asked, placed / asked


@pytest.mark.parametrize(
    ("sizes", "count"),
    [(SQUARES, 40), (QUARTERS, 200), (LARGE, 16)],
    ids=["square", "all", "large"],
)
def test_scorer_reads_drawn_scenes(sizes, count):
    right, placed = shares(sizes, count)
    assert right >= 0.99 and placed >= 0.99


def test_scorer_is_at_chance_on_shuffled_captions():
    _, placed = shares([(128, 128)], 400, shuffled=True)
    chance = 1 / (len(PALETTE) * len(SHAPES))  # 4.2 %, less where the counts differ
    assert placed < chance + 0.025  # 2.5 standard errors of 800 objects, rounded up


def test_scorer_sees_nothing_in_noise_or_emptiness():
    assert find(np.full((256, 256, 3), 0.9, np.float32)) == []
    noise = np.random.default_rng(0).random((256, 256, 3), np.float32)
    assert all(item.shape == "none" for item in find(noise)) or not find(noise)


def test_spurious_and_misplaced_things_are_counted():
    red, blue = Thing("red", "circle"), Thing("blue", "square")
    scene = Scene((red, blue), "column")
    rng = np.random.default_rng(0)
    image = draw(scene, place(scene, 256, 256, rng), 256, 256)
    assert score(image, scene).exact
    swapped = score(image, Scene((blue, red), "column"))
    assert (swapped.right, swapped.placed, swapped.exact) == (2, 0, False)
    assert score(image, Scene((red,))).spurious == 1


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_background_is_its_own_colour_not_the_nearest_one(name):
    scene = Scene((), background=name)
    for other, color in (BACKGROUNDS | PALETTE).items():
        image = np.full((64, 64, 3), np.array(color) / 255, np.float32)
        assert score(image, scene).background == (other == name)


def test_components_of_a_mask():
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool)  # a U, and a diagonal corner
    labels = connected_components(mask)
    assert labels.max() == 2 and labels[0, 0] == labels[0, 2] != labels[2, 3]
    assert (labels[~mask] == 0).all()


def test_split_never_shares_a_combination():
    rng = np.random.default_rng(0)
    training = {random_scene(rng, held_out=False).key() for _ in range(3000)}
    held_out = {random_scene(rng, held_out=True).key() for _ in range(500)}
    assert not training & held_out
    assert 0.05 < np.mean([random_scene(rng).held_out() for _ in range(2000)]) < 0.15


def test_both_phrasings_of_a_relation_fall_on_the_same_side():
    first, second = Thing("red", "circle", "large"), Thing("blue", "square")
    scene = Scene((first, second), "column", "gray")
    plain = Scene((Thing("red", "circle"), second), "column")
    assert scene.key() == plain.key()  # size and background make no new combination
    said = {caption(plain, np.random.default_rng(seed)) for seed in range(40)}
    assert {"a red circle above a blue square", "a blue square below a red circle"} <= said
    assert all(text == text.lower() for text in said)


def test_a_crop_is_a_window_of_the_whole():
    rng = np.random.default_rng(3)
    scene = random_scene(rng)
    places = place(scene, 256, 384, rng)
    whole = draw(scene, places, 256, 384)
    crop = draw(scene, places, 64, 96, left=150, top=90)
    np.testing.assert_allclose(crop, whole[90:154, 150:246], atol=1e-5)  # float32 offsets
