"""Drawn scenes as training data: latents of the right scenes, whole files, captions that fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.config import Precision
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.errors import ConfigError
from pixart_rt.model.vae import VaeEncoder, read_vae
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.tiny import latents as latents_file
from pixart_rt.training.tiny.kinds import Scenes
from pixart_rt.training.tiny.latents import Latents, SceneSet
from pixart_rt.training.tiny.scenes import SHAPES, caption
from pixart_rt.training.tiny.source import CaptionEncoder, open_scenes, phase_buckets

BUCKETS = tuple(
    Bucket(ratio=h / w, height=16 * h, width=16 * w) for h, w in ((2, 2), (1, 4), (4, 1))
)
COUNT = 23


@pytest.fixture
def ranks():
    with start_ranks("cpu") as ranks:
        yield ranks


def opened(root, ranks, kind=Scenes.DENSE, count=COUNT, table=BUCKETS):
    return open_scenes(kind, count, table, root, ranks)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files for a bucket, several batches for a file."""
    monkeypatch.setattr(latents_file, "CHUNK_PIXELS", 3 * 32 * 32)
    monkeypatch.setattr(latents_file, "BATCH_PIXELS", 2 * 32 * 32)


def test_a_batch_has_its_scenes_latents(ranks, tmp_path):
    """Oracle: the scene drawn and encoded alone, in float32. bfloat16 keeps 8 bits of a product;
    over the encoder's 20 layers a twentieth of a latent's deviation is lost at most."""
    source = opened(tmp_path, ranks)
    vae = VaeEncoder(read_vae(TINY / "vae"))
    for bucket in range(len(BUCKETS)):
        mine = np.flatnonzero(source.bucket_of == bucket)[::-1][:5]
        batch = source.batch(mine.tolist(), 0, 0)
        assert batch.bucket == BUCKETS[bucket] and batch.ids.tolist() == mine.tolist()
        for row, number in enumerate(mine):
            image = torch.from_numpy(source.scenes.image(int(number), BUCKETS[bucket]))
            with torch.no_grad():
                expected = vae(image.permute(2, 0, 1)[None] * 2 - 1)[0]
            assert (batch.latents[row] - expected).square().mean().sqrt() < 0.05
    with pytest.raises(ConfigError, match="a batch is of one bucket"):
        source.latents[[int(np.flatnonzero(source.bucket_of == each)[0]) for each in (0, 1)]]


def test_encoding_that_was_stopped_goes_on(ranks, tmp_path):
    """What is there is not written again; ranks write all of it between them."""
    whole = opened(tmp_path / "whole", ranks).latents
    scenes = SceneSet(kind=Scenes.DENSE, count=COUNT, buckets=BUCKETS)
    parts = Latents(scenes, tmp_path / "parts", TINY / "vae")
    stop = KeyboardInterrupt

    def stops(done, total):
        if done == 2:
            raise stop

    with pytest.raises(stop):
        parts.encode(ranks.device, progress=stops)
    written = {path: path.stat().st_mtime_ns for path in parts.folder.iterdir()}
    assert len(written) == 2
    for rank in (1, 0):
        parts.encode(ranks.device, rank, 2)
    names = {path.name for path, *_ in whole.chunks()}
    assert {path.name for path in parts.folder.iterdir()} == names and len(names) > 6
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    for bucket in range(len(BUCKETS)):
        mine = np.flatnonzero(whole.bucket_of == bucket).tolist()
        assert torch.equal(whole[mine], parts[mine])


def test_captions_are_new_in_every_step_and_the_same_again(ranks, tmp_path):
    source = opened(tmp_path, ranks)
    said = {source.caption(3, 0, step) for step in range(30)}
    possible = {caption(source.scenes.scene(3), np.random.default_rng(k)) for k in range(300)}
    assert len(said) > 3 and said <= possible
    assert source.caption(3, 0, 7) == source.caption(3, 0, 7)
    numbers = np.flatnonzero(source.bucket_of == 0).tolist()
    whole, part = source.batch(numbers, 5, 2), source.batch(numbers[1:3], 5, 2)
    torch.testing.assert_close(
        whole.prompt_embeds[1:3].float(), part.prompt_embeds.float(), atol=2e-2, rtol=2e-2
    )
    assert torch.equal(whole.prompt_mask[1:3], part.prompt_mask)


def test_sparse_captions_name_one_thing_of_the_same_scene(ranks, tmp_path):
    dense, sparse = opened(tmp_path, ranks), opened(tmp_path, ranks, Scenes.SPARSE)
    assert dense.latents.folder == sparse.latents.folder and dense.identity != sparse.identity
    for number in range(COUNT):
        assert dense.scenes.scene(number) == sparse.scenes.scene(number)
        things = dense.scenes.scene(number).things
        texts = [sparse.caption(number, 0, step) for step in range(6)]
        for text in texts:
            named = sum(text.count(shape) for shape in SHAPES)
            assert named == 1 and any(f"{each.color} {each.shape}" in text for each in things)


def test_classes_are_shapes(ranks, tmp_path):
    source = opened(tmp_path, ranks, Scenes.CLASSES)
    numbers = np.flatnonzero(source.bucket_of == 0).tolist()
    batch = source.batch(numbers, 0, 0)
    scenes = [source.scenes.scene(each) for each in numbers]
    assert all(len(scene.things) == 1 and not scene.held_out() for scene in scenes)
    assert [SHAPES[label] for label in batch.labels] == [each.things[0].shape for each in scenes]
    assert torch.equal(batch.prompt_embeds[0], source.empty_prompt)


def test_text_features_are_those_of_the_package(ranks):
    """Oracle: FeatureEncoder, which cleans captions and pads to the longest; masked padding moves
    results by rounding of bfloat16 only."""
    texts = ["a red circle above a blue square", "", "there is a small green star"]
    embeds, mask = CaptionEncoder(TINY, torch.device("cpu"))(texts)
    encoder = FeatureEncoder.open(
        EncoderConfig(model="tiny", text_precision=Precision.FP32), torch.device("cpu")
    )
    expected, _ = encoder.text(texts)
    for row, one in enumerate(expected):
        torch.testing.assert_close(embeds[row, mask[row]], one, atol=2e-2, rtol=2e-2)
        assert not embeds[row, ~mask[row]].any()


def test_the_sizes_of_a_phase():
    assert [(each.height, each.width) for each in phase_buckets(512, False)] == [(512, 512)]
    assert len(phase_buckets(512, True)) == 40


def test_no_scenes_are_refused():
    with pytest.raises(ConfigError, match="0 scenes of 3 sizes"):
        SceneSet(kind=Scenes.DENSE, count=0, buckets=BUCKETS)


def test_another_set_has_other_files():
    vae = TINY / "vae"
    plain = SceneSet(kind=Scenes.DENSE, count=COUNT, buckets=BUCKETS)
    changed = [{"seed": 1}, {"count": 24}, {"buckets": BUCKETS[:2]}, {"kind": Scenes.CLASSES}]
    names = {dataclasses.replace(plain, **each).identity(vae) for each in ({}, *changed)}
    assert len(names) == 5
