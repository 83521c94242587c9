"""A few pictures in memory: an online source's features, buckets that pair, bad input refused."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_rt.data.crop import bucket_table
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.instances import (
    captioned_pictures,
    encode_instances,
    pictures_of,
)
from pixart_rt.data.online import OnlineSource
from pixart_rt.errors import ConfigError, DataError

TABLE = bucket_table(256, square=False)
PROMPT = "a photo of sks dog"


def paint(path, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)


def plain_folder(root, sizes, seed=0):
    root.mkdir()
    for number, (height, width) in enumerate(sizes):
        paint(root / f"{number}.png", height, width, seed + number)
    return root


def test_features_are_those_of_an_online_source(tmp_path, draw_images, encoder):
    images = draw_images(tmp_path / "images", 5)
    online = OnlineSource(ImageFolder(images), encoder, TABLE)
    held = encode_instances(encoder, TABLE, captioned_pictures(images))
    np.testing.assert_array_equal(held.bucket_of, online.bucket_of)
    assert held.num_instances == len(held) == 5
    for sample in range(5):
        expected = online.finish(online.load([sample], seed=2, step=7))
        actual = held.finish(held.load([sample], seed=2, step=7))
        torch.testing.assert_close(actual.latents, expected.latents)
        # bf16 of the text, encoded here next to longer captions
        torch.testing.assert_close(
            actual.prompt_embeds, expected.prompt_embeds, rtol=2**-7, atol=1e-2
        )
        for name in ("ids", "prompt_mask", "original_size", "aspect_ratio"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name
        assert actual.bucket == expected.bucket


def test_latents_are_drawn_anew_at_every_step(tmp_path, encoder):
    folder = plain_folder(tmp_path / "dog", [(256, 256), (260, 256)])
    source = encode_instances(encoder, TABLE, pictures_of(folder, PROMPT))
    first, again, later = (source.load([0, 1], seed=0, step=step) for step in (3, 3, 4))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, later.latents)
    assert torch.equal(first.prompt_embeds[0], first.prompt_embeds[1])
    assert len(source.texts) == 1, "one prompt is encoded once"


def test_a_plain_folder_is_its_pictures_by_name(tmp_path):
    folder = plain_folder(tmp_path / "dog", [(64, 64), (64, 80)])
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "more.png").mkdir()
    assert [each.path.name for each in pictures_of(folder, PROMPT)] == ["0.png", "1.png"]
    assert {each.caption for each in pictures_of(folder, PROMPT)} == {PROMPT}


def test_each_bucket_in_use_has_class_pictures(tmp_path, encoder):
    """Instances: square and wide. Class: square and tall; none is wide, so all are cut so too."""
    dog = plain_folder(tmp_path / "dog", [(256, 256), (150, 300)])
    animals = plain_folder(tmp_path / "class", [(256, 250), (400, 200), (300, 300)], seed=9)
    source = encode_instances(
        encoder, TABLE, pictures_of(dog, PROMPT), pictures_of(animals, "a photo of a dog")
    )
    assert source.num_instances == 2
    square, wide = source.bucket_of[:2]
    assert TABLE[square].ratio == 1
    assert TABLE[wide].ratio == 0.5
    assert source.bucket_of[2:].tolist() == [square] * 3 + [wide] * 3
    batch = source.load([1, 5], seed=0, step=0)
    assert batch.latents.shape == (2, 4, *(side * 2 for side in TABLE[wide].grid))
    assert not torch.equal(batch.prompt_embeds[0], batch.prompt_embeds[1])


def test_a_picture_may_have_several_ids_and_so_several_noises(tmp_path, encoder):
    dog = plain_folder(tmp_path / "dog", [(256, 256), (150, 300)])
    animals = plain_folder(tmp_path / "class", [(256, 256)], seed=9)
    source = encode_instances(
        encoder, TABLE, pictures_of(dog, PROMPT), pictures_of(animals, "a dog"), repeats=3
    )
    assert source.num_instances == 6
    assert len(source) == 6 + 3 * 2
    batch = source.load([0, 2, 4], seed=0, step=0)
    assert not torch.equal(batch.latents[0], batch.latents[1])
    assert source.samples[0].moments is source.samples[4].moments
    assert {sample.caption for sample in source.samples[:6]} != {source.samples[6].caption}


def test_captions_through_a_projection(tmp_path, encoder):
    folder = plain_folder(tmp_path / "dog", [(256, 256)])
    source = encode_instances(encoder, TABLE, pictures_of(folder, PROMPT))
    linear = torch.nn.Linear(encoder.text_width, 7)
    plain, projected = (
        each.load([0], seed=0, step=0) for each in (source, source.projected(linear))
    )
    assert torch.equal(plain.latents, projected.latents)
    assert torch.equal(plain.prompt_mask, projected.prompt_mask)
    with torch.no_grad():
        expected = linear(plain.prompt_embeds.float())
    torch.testing.assert_close(projected.prompt_embeds, expected)
    assert not projected.prompt_embeds.requires_grad


def test_a_worker_gets_all_of_it(tmp_path, encoder):
    folder = plain_folder(tmp_path / "dog", [(256, 256)])
    source = encode_instances(encoder, TABLE, pictures_of(folder, PROMPT))
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(
        again.load([0], seed=1, step=2).latents, source.load([0], seed=1, step=2).latents
    )


def test_captions_that_are_cut_are_counted(tmp_path, encoder):
    folder = plain_folder(tmp_path / "dog", [(256, 256)])
    long = "a red circle above a blue square " * 60
    assert encode_instances(encoder, TABLE, pictures_of(folder, long)).num_cut == 1
    assert encode_instances(encoder, TABLE, pictures_of(folder, PROMPT)).num_cut == 0


def test_what_cannot_be_is_refused(tmp_path, encoder):
    with pytest.raises(DataError, match="is no folder"):
        pictures_of(tmp_path / "absent", PROMPT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no pictures"):
        pictures_of(tmp_path / "empty", PROMPT)
    folder = plain_folder(tmp_path / "dog", [(256, 256), (150, 300)])
    source = encode_instances(encoder, TABLE, pictures_of(folder, PROMPT))
    with pytest.raises(ConfigError, match="of one bucket"):
        source.load([0, 1], seed=0, step=0)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png"):
        encode_instances(encoder, TABLE, pictures_of(folder, PROMPT))
    shutil.rmtree(folder)


def test_all_bad_pictures_are_named_at_once(tmp_path, encoder):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(DataError, match=r"2 of 3 pictures cannot be read: .*a\.png.*; .*c\.png"):
        encode_instances(encoder, bucket_table(256, square=True), pictures_of(tmp_path, "x"))
