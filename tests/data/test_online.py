"""Encoding while training gives what a store gives, but for its rounding."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pixart_rt.data.crop import bucket_table
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.loader import StepDataset
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError, DataError

TABLE = bucket_table(256, square=False)


@pytest.fixture
def online(pictures, encoder):
    return OnlineSource(ImageFolder(pictures), encoder, TABLE, threads=2)


def test_both_sources_agree(online, store):
    features = FeatureStore(store)
    assert len(online) == len(features)
    np.testing.assert_array_equal(online.bucket_of, features.bucket_of)
    assert online.buckets == features.buckets
    for bucket in np.unique(online.bucket_of):
        ids = np.flatnonzero(online.bucket_of == bucket)
        kept = features.load(ids, seed=2, step=7)
        fresh = online.finish(online.load(ids, seed=2, step=7))
        assert torch.equal(kept.ids, fresh.ids)
        # float16 of the moments; and the text's bf16, where a sum in another order rounds over
        torch.testing.assert_close(fresh.latents, kept.latents, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(fresh.prompt_embeds, kept.prompt_embeds, rtol=2**-7, atol=1e-2)
        for name in ("prompt_mask", "original_size", "aspect_ratio"):
            assert torch.equal(getattr(kept, name), getattr(fresh, name)), name
        assert kept.bucket == fresh.bucket


def test_workers_read_and_the_trainer_encodes(online):
    ids = np.flatnonzero(online.bucket_of == 20).tolist()
    steps = StepDataset(online, lambda step: [ids[step], ids[step + 1]], seed=0)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(3), num_workers=1, multiprocessing_context="fork"
    )
    for step, loaded in enumerate(loader):
        batch = online.finish(loaded)
        assert batch.ids.tolist() == ids[step : step + 2]
        expected = online.finish(online.load(ids[step : step + 2], seed=0, step=step))
        torch.testing.assert_close(batch.latents, expected.latents)


def test_a_pickled_source_reads_but_cannot_encode(online):
    again = pickle.loads(pickle.dumps(online))
    loaded = again.load([0], seed=0, step=0)
    assert loaded.pixels.shape == (1, 256, 256, 3)
    with pytest.raises(AssertionError, match="cannot encode"):
        again.finish(loaded)


def test_pictures_without_a_header_are_left_out(tmp_path, draw_images, encoder):
    images = draw_images(tmp_path / "images", 5)
    (images / "0001.png").write_bytes(b"x")
    whole = (images / "0003.png").read_bytes()
    (images / "0003.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    source = OnlineSource(ImageFolder(images), encoder, TABLE)
    assert len(source) == 4
    assert [line for line, _ in source.skipped] == [1]
    assert source.load([1], seed=0, step=0).ids == [1]  # the third line's picture
    with pytest.raises(DataError, match=r"0003\.png"):
        source.load([2], seed=0, step=0)


def test_what_cannot_be_is_refused(online, tmp_path, draw_images, encoder):
    with pytest.raises(ConfigError, match="of one bucket"):
        online.load([0, 1], seed=0, step=0)
    images = draw_images(tmp_path / "images", 1)
    (images / "0000.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no picture that can be read"):
        OnlineSource(ImageFolder(images), encoder, TABLE)
