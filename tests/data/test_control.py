"""Control images in training batches: on the fly and from a pair of stores, for every bucket."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixart_rt.data.control import ControlledSource, PairedSource, draw_edges
from pixart_rt.data.crop import bucket_table, fit, nearest, open_rgb
from pixart_rt.data.edges import Canny
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import METADATA, ImageFolder
from pixart_rt.data.loader import StepDataset
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import DataError

TABLE = bucket_table(256, square=False)
FINDER = Canny(high=8.0)


@pytest.fixture
def online(pictures, encoder):
    return ControlledSource(OnlineSource(ImageFolder(pictures), encoder, TABLE), FINDER)


@pytest.fixture(scope="module")
def edge_folder(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("edges") / "canny"
    assert draw_edges(ImageFolder(pictures), out, TABLE, FINDER, threads=2) == 0
    return out


@pytest.fixture(scope="module")
def edge_store(edge_folder, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("edge-store") / "256"
    config = ExtractConfig(shard_images=7, batch=2, threads=2)
    assert Extraction(ImageFolder(edge_folder), out, encoder, config, "tiny").run().complete
    return out


def test_the_condition_is_the_vae_of_the_fitted_pictures_edges(online, pictures, encoder) -> None:
    folder = ImageFolder(pictures)
    for bucket in np.unique(online.bucket_of):
        ids = np.flatnonzero(online.bucket_of == bucket).tolist()
        loaded = online.load(ids, seed=1, step=2)
        batch = online.finish(loaded)
        assert batch.condition is not None and batch.condition.shape == batch.latents.shape
        plain = online.source.finish(online.source.load(ids, seed=1, step=2))
        torch.testing.assert_close(batch.latents, plain.latents, atol=0, rtol=0)
        for row, sample in enumerate(ids):
            fitted = fit(open_rgb(folder[sample].path), TABLE[bucket]).pixels
            edges = torch.from_numpy(FINDER(fitted)).float() / 127.5 - 1
            assert edges.max() == 1, "the picture has edges"
            image = edges.expand(1, 3, *edges.shape)
            with torch.no_grad():
                expected = encoder.vae.encode(image).latent_dist.mean * encoder.scaling_factor
            # batches are encoded together; a convolution's sums may be in another order
            torch.testing.assert_close(batch.condition[row], expected[0], atol=1e-4, rtol=1e-4)


def test_two_stores_give_what_is_found_on_the_fly(online, store, edge_store) -> None:
    paired = PairedSource(FeatureStore(store), FeatureStore(edge_store))
    assert len(paired.bucket_of) == len(online.bucket_of) == 12
    np.testing.assert_array_equal(paired.bucket_of, online.bucket_of)
    assert paired.buckets == online.buckets
    assert len(np.unique(paired.bucket_of)) > 3, "several shapes"
    for bucket in np.unique(paired.bucket_of):
        ids = np.flatnonzero(paired.bucket_of == bucket).tolist()
        kept = paired.finish(paired.load(ids, seed=1, step=2))
        fresh = online.finish(online.load(ids, seed=1, step=2))
        # float16 of the moments
        torch.testing.assert_close(kept.condition, fresh.condition, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(kept.latents, fresh.latents, rtol=2e-3, atol=2e-3)
        assert torch.equal(kept.original_size, fresh.original_size), "the picture's, not the edges'"
        assert torch.equal(kept.prompt_mask, fresh.prompt_mask)


def test_workers_find_edges_and_the_trainer_encodes(online) -> None:
    ids = np.flatnonzero(online.bucket_of == 20).tolist()[:2]
    steps = StepDataset(online, lambda step: ids, seed=0)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(1), num_workers=1, multiprocessing_context="fork"
    )
    batch = online.finish(next(iter(loader)))
    expected = online.finish(online.load(ids, seed=0, step=0))
    torch.testing.assert_close(batch.condition, expected.condition)
    again = pickle.loads(pickle.dumps(online))
    np.testing.assert_array_equal(
        again.load(ids, seed=0, step=0).edges, online.load(ids, seed=0, step=0).edges
    )


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_drawn_edges_are_cut_to_their_own_bucket_as_they_are(resolution) -> None:
    """What the alignment of the two stores rests on, for all 40 shapes."""
    table = bucket_table(resolution, square=False)
    random = np.random.default_rng(resolution)
    for index, bucket in enumerate(table):
        assert nearest(table, bucket.height, bucket.width) == index
        drawn = random.integers(0, 2, (bucket.height, bucket.width, 1), np.uint8).repeat(3, 2) * 255
        np.testing.assert_array_equal(fit(Image.fromarray(drawn), bucket).pixels, drawn)


def test_a_folder_of_edges_keeps_the_lines(tmp_path, draw_images) -> None:
    images = draw_images(tmp_path / "images", 4)
    (images / "0001.png").write_bytes(b"no picture")
    out = tmp_path / "edges"
    seen = []
    folder = ImageFolder(images)
    assert draw_edges(
        folder, out, TABLE, FINDER, threads=2, progress=lambda *state: seen.append(state)
    ) == 1  # fmt: skip
    assert seen[-1] == ("edges", 3, 4)
    lines = [json.loads(line) for line in (out / METADATA).read_text().splitlines()]
    assert [line["text"] for line in lines] == [""] * 4
    assert [(out / line["file_name"]).is_file() for line in lines] == [True, False, True, True]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert draw_edges(folder, out, TABLE, FINDER) == 1, "a second call has nothing to do"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    with pytest.raises(DataError, match="something else than these edges"):
        draw_edges(folder, out, TABLE, Canny(high=9.0))
    with pytest.raises(DataError, match="something else than these edges"):
        draw_edges(folder, images, TABLE, FINDER)


def test_an_empty_folder_may_be_named(tmp_path, draw_images) -> None:
    """As a kill leaves one before the first file."""
    images = ImageFolder(draw_images(tmp_path / "images", 1))
    (tmp_path / "edges").mkdir()
    assert draw_edges(images, tmp_path / "edges", TABLE, FINDER) == 0


def test_a_stopped_drawing_goes_on(tmp_path, draw_images) -> None:
    images = draw_images(tmp_path / "images", 3)
    calls = []

    def stops(pixels):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return FINDER(pixels)

    with pytest.raises(KeyboardInterrupt):
        draw_edges(ImageFolder(images), tmp_path / "edges", TABLE, stops, threads=1)
    assert not (tmp_path / "edges" / METADATA).exists()
    calls.clear()
    assert draw_edges(ImageFolder(images), tmp_path / "edges", TABLE, stops, threads=1) == 0
    assert len(calls) == 1, "only the third was missing"


def test_a_store_of_other_pictures_is_refused(store, edge_folder, encoder, tmp_path) -> None:
    other = tmp_path / "edges"
    shutil.copytree(edge_folder, other)
    lines = (other / METADATA).read_text().splitlines(keepends=True)
    (other / METADATA).write_text("".join([*lines[1:], lines[0]]))  # a rotation of the order
    config = ExtractConfig(shard_images=50, batch=4, threads=2)
    Extraction(ImageFolder(other), tmp_path / "store", encoder, config, "tiny").run()
    with pytest.raises(DataError, match=r"does not belong to .*: their buckets of the samples"):
        PairedSource(FeatureStore(store), FeatureStore(tmp_path / "store"))
