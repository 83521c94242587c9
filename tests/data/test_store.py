"""Reading a store: batches, noise anew at every step, damage found, workers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pixart_rt.buckets import buckets
from pixart_rt.data import store as store_module
from pixart_rt.data.batch import draw_noise
from pixart_rt.data.loader import StepDataset
from pixart_rt.data.manifest import INDEX, MANIFEST, StoreManifest, shard_name
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.training.sampler import BucketSampler

SQUARE = 20  # the bucket of five of the twelve pictures


def of_bucket(features: FeatureStore, bucket: int) -> list[int]:
    return np.flatnonzero(features.bucket_of == bucket).tolist()


@pytest.fixture
def copy(store, tmp_path):
    """A store that a test may damage."""
    return shutil.copytree(store, tmp_path / "copy")


def test_a_batch_is_drawn_from_the_moments(store):
    features = FeatureStore(store)
    ids = of_bucket(features, SQUARE)
    batch = features.load(ids, seed=5, step=9)
    noise = draw_noise(5, 9, ids, (4, 32, 32))
    for row, sample in enumerate(ids):
        mean, deviation = features.moments(sample).float()
        expected = (mean + deviation * noise[row]) * features.manifest.scaling_factor
        torch.testing.assert_close(batch.latents[row], expected)
        text = features.text(sample)
        assert torch.equal(batch.prompt_embeds[row, : len(text)], text)
        assert batch.prompt_mask[row].sum() == len(text)
        assert tuple(batch.original_size[row].tolist()) == features.original_size(sample)
    assert batch.ids.tolist() == ids
    assert batch.prompt_embeds.shape == (len(ids), 120, 128)
    assert batch.prompt_embeds.dtype == torch.bfloat16
    assert batch.aspect_ratio.tolist() == [[1.0]] * len(ids)
    assert batch.bucket == buckets(256)[SQUARE]


def test_the_scaling_factor_is_applied(copy):
    """Tiny's is 1, which would hide a missing one."""
    values = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**values, "scaling_factor": 0.18215}))
    scaled, plain = FeatureStore(copy).load([0], seed=0, step=0), FeatureStore(copy)
    mean, deviation = plain.moments(0).float()
    expected = (mean + deviation * draw_noise(0, 0, [0], (4, 32, 32))[0]) * 0.18215
    torch.testing.assert_close(scaled.latents[0], expected)


def test_latents_are_drawn_anew_at_every_step(store):
    """The original draws once and trains on that one sample in every epoch."""
    features = FeatureStore(store)
    first, again, later = (features.load([0], seed=1, step=step).latents for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, features.load([0], seed=2, step=3).latents)


def test_a_changed_byte_is_found(copy):
    features = FeatureStore(copy)
    rows = np.load(copy / INDEX)
    path = copy / shard_name(int(rows[7]["shard"]))
    data = bytearray(path.read_bytes())
    data[int(rows[7]["text_at"]) + 11] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"sample 7 in .*shard-00001\.parquet is damaged"):
        features.text(7)
    assert features.damaged() == [7]
    assert len(FeatureStore(copy, verify=False).text(7)) == int(features.num_tokens[7])


def test_a_changed_index_is_found(copy):
    rows = np.load(copy / INDEX)
    rows["original_size"][3] += 1
    np.save(copy / INDEX, rows)
    assert FeatureStore(copy).damaged() == [3]


def test_a_truncated_shard_is_found(copy):
    path = copy / shard_name(2)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="beyond the end"):
        FeatureStore(copy).text(11)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="missing or empty"):
        FeatureStore(copy).text(11)


def test_folders_that_are_no_store_are_refused(copy, tmp_path):
    with pytest.raises(DataError, match="no feature store"):
        FeatureStore(tmp_path)
    np.save(copy / INDEX, np.zeros(3))
    with pytest.raises(DataError, match="not the index of this store"):
        FeatureStore(copy)
    (copy / INDEX).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        FeatureStore(copy)
    good = json.loads((copy / MANIFEST).read_text())
    for text, words in (("{", "damaged"), ("[]", "damaged"),
                        (json.dumps({**good, "format_version": 99}), "format 99"),
                        (json.dumps({**good, "surprise": 1}), "damaged")):  # fmt: skip
        (copy / MANIFEST).write_text(text)
        with pytest.raises(DataError, match=words):
            StoreManifest.read(copy)


def test_batches_that_cannot_be_are_refused(store):
    features = FeatureStore(store)
    with pytest.raises(ConfigError, match="of one bucket"):
        features.load([0, 1], seed=0, step=0)
    with pytest.raises(ConfigError, match="sample 12 was requested"):
        features.load([12], seed=0, step=0)
    with pytest.raises(ConfigError, match="no samples"):
        features.load([], seed=0, step=0)


def test_few_files_are_open_at_a_time(store, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    features = FeatureStore(store)
    held = features.text(0)
    for sample in (0, 6, 11, 3, 8, 10, 1):
        assert len(features.text(sample)) == features.num_tokens[sample]
        assert len(features._mapped) <= 2
    assert torch.equal(held, features.text(0)), "a tensor outlives its file"


def test_a_pickled_store_reads_the_same(store):
    features = FeatureStore(store)
    features.text(3)
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again.moments(3), features.moments(3))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_through_a_data_loader(store, num_workers):
    """The sampler, the store and workers together: two epochs use every sample twice, in order."""
    features = FeatureStore(store)
    tokens = [bucket.num_tokens for bucket in features.buckets]
    sampler = BucketSampler(features.bucket_of, tokens, token_budget=256, seed=3)
    steps = StepDataset(features, sampler.ids, seed=3)
    stop = sampler.steps_before(2)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(stop), num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
    )  # fmt: skip
    used = []
    for step, loaded in enumerate(loader):
        batch = features.finish(loaded)
        expected = features.load(sampler.ids(step), seed=3, step=step)
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.latents, expected.latents)
        assert batch.bucket == expected.bucket
        used += batch.ids.tolist()
    assert sorted(used) == sorted([*range(12), *range(12)])


def test_reading_needs_no_parquet_library(store):
    code = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"
        "from pixart_rt.data.store import FeatureStore\n"
        f"print(len(FeatureStore({str(store)!r}).text(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == FeatureStore(store).num_tokens[3]
