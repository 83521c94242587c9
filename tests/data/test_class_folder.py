"""Folders of classes: labels by torchvision's rule, and never those of another image."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pixart_rt.data.class_folder import ClassFolder, open_images
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.loader import StepDataset
from pixart_rt.data.manifest import CLASSES, INDEX, LABELS, MANIFEST, shard_name
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import DataError
from pixart_rt.model.dit import DiT, DiTConfig
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.objectives.denoising import ClassObjective
from pixart_rt.training.sample_rng import draw

NAMES = ["n02", "Zebra", "n01", "ü"]  # sorted: Zebra, n01, n02, ü
FILES = {  # class by picture, from 0
    "Zebra/9.jpg": 0, "n01/a/1.png": 1, "n01/a/b/0.JPEG": 1, "n01/b.png": 1, "n02/7.jpg": 2,
    "n02/8.jpg": 2, "ü/0.jpg": 3, "ü/1.PNG": 3, "ü/z.jpg": 3,
}  # fmt: skip


@pytest.fixture
def images(tmp_path, draw_images):
    """Nine pictures in four classes, and files that are none."""
    flat = draw_images(tmp_path / "flat", len(FILES))
    root = tmp_path / "images"
    for number, name in enumerate(FILES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(flat.glob(f"{number:04d}.*")), path)
    (root / "n01" / "notes.txt").write_text("x")
    (root / "readme.jpg").write_bytes(b"next to the classes")
    for hidden in (root / ".cache", root / "n01" / ".thumbs"):
        hidden.mkdir()
        shutil.copy(root / "ü" / "0.jpg", hidden / "0.jpg")
    (root / "n01" / ".hidden.jpg").write_bytes(b"x")
    return root


@pytest.fixture
def make(encoder):
    """make(images, store): an extraction, not yet run, in shards of two images."""

    def extraction(images, store):
        config = ExtractConfig(shard_images=2, batch=3, threads=2, square=True)
        return Extraction(ClassFolder(images), store, encoder, config, "tiny")

    return extraction


def test_labels_count_the_subfolders_in_order(images):
    folder = ClassFolder(images)
    assert folder.classes == ("Zebra", "n01", "n02", "ü")
    entries = [folder[index] for index in range(len(folder))]
    found = {entry.file_name: entry.label for entry in entries}
    assert found == FILES
    assert folder.labels.tolist() == [entry.label for entry in entries]
    assert all(entry.path.is_file() and entry.caption == "" for entry in entries)
    for index in (-1, len(FILES)):
        with pytest.raises(IndexError):
            folder[index]
    again = pickle.loads(pickle.dumps(folder))
    assert [again[index] for index in range(len(again))] == entries


def test_labels_are_torchvisions(images):
    """Its rule, in its own words: classes = sorted(entry.name for entry in os.scandir(directory) if
    entry.is_dir()); DiT's published checkpoints are trained on labels by it. It counts hidden
    folders too, which ours leaves out."""
    theirs = sorted(path.name for path in images.iterdir() if path.is_dir())
    theirs.remove(".cache")
    assert list(ClassFolder(images).classes) == theirs


def test_the_digest_sees_every_change(images):
    before = ClassFolder(images).digest()
    assert ClassFolder(images).digest() == before
    moved = images / "n01" / "7.jpg"
    (images / "n02" / "7.jpg").rename(moved)
    changed = ClassFolder(images).digest()
    assert changed != before
    moved.rename(images / "n02" / "7.jpg")
    assert ClassFolder(images).digest() == before


def test_what_is_no_folder_of_classes_is_refused(images, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        ClassFolder(tmp_path / "none")
    with pytest.raises(DataError, match="has no subfolders"):
        ClassFolder(images / "n02")
    (images / "empty" / "inside").mkdir(parents=True)
    with pytest.raises(DataError, match=r"class empty of .* has no image \(\.bmp, "):
        ClassFolder(images)
    (images / "empty" / "\udcff.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="is not UTF-8"):
        ClassFolder(images)


def test_a_data_set_is_what_its_folder_holds(images, pictures, tmp_path):
    assert isinstance(open_images(images), ClassFolder)
    assert isinstance(open_images(pictures), ImageFolder)
    (images / "n01" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}')
    assert isinstance(open_images(images), ImageFolder), "captions first"
    assert isinstance(open_images(images, classes=True), ClassFolder)
    bare = tmp_path / "bare"
    (bare / "inside").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no metadata\.jsonl; .* give each class a subfolder"):
        open_images(bare)
    with pytest.raises(DataError, match="is no folder"):
        open_images(tmp_path / "none")


def test_a_store_keeps_labels(images, tmp_path, make, encoder):
    assert make(images, tmp_path / "store").run().complete
    store = FeatureStore(tmp_path / "store")
    assert store.classes == ("Zebra", "n01", "n02", "ü")
    assert store.labels.tolist() == list(FILES.values())
    batch = store.load([8, 0, 4], seed=0, step=0)
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [3, 0, 2]
    empty = store.empty_prompt
    assert all(torch.equal(store.text(sample), empty) for sample in range(len(store)))
    assert batch.prompt_embeds.shape[:2] == batch.prompt_mask.shape == (3, len(empty))
    assert batch.prompt_mask.all() and torch.equal(batch.prompt_embeds[1], empty)
    assert json.loads((tmp_path / "store" / CLASSES).read_text()) == list(store.classes)


def test_skipped_images_do_not_shift_labels(images, tmp_path, make):
    broken = ["n01/a/1.png", "n02/8.jpg", "ü/0.jpg"]
    for name in broken:
        (images / name).write_bytes(b"no picture")
    make(images, tmp_path / "store").run()
    store = FeatureStore(tmp_path / "store")
    assert store.labels.tolist() == [label for name, label in FILES.items() if name not in broken]
    listed = (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in listed] == broken


def test_a_restart_keeps_labels(images, tmp_path, make, monkeypatch):
    """Stopped inside the third shard of five, with a skipped image before and one after."""
    for name in ("n01/a/1.png", "ü/1.PNG"):
        (images / name).write_bytes(b"no picture")
    make(images, tmp_path / "whole").run()
    stopped = make(images, tmp_path / "store")

    def progress(name, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(progress)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 2
    assert not (tmp_path / "store" / LABELS).exists()
    make(images, tmp_path / "store").run()
    whole, store = (FeatureStore(tmp_path / name) for name in ("whole", "store"))
    expected = [0, 1, 1, 2, 2, 3, 3]
    assert store.labels.tolist() == whole.labels.tolist() == expected
    for name in (INDEX, LABELS, CLASSES, shard_name(2)):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", [LABELS, CLASSES])
def test_lost_labels_are_written_again(images, tmp_path, make, name):
    make(images, tmp_path / "store").run()
    path = tmp_path / "store" / name
    before = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=f"{name} cannot be read .* run the `pixart-rt data"):
        FeatureStore(tmp_path / "store").classes  # noqa: B018
    make(images, tmp_path / "store").run()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "labels", [np.arange(9), np.zeros(8, np.int64), np.zeros(9, np.int32), np.full(9, -1)]
)
def test_labels_of_another_store_are_refused(images, tmp_path, make, labels):
    make(images, tmp_path / "store").run()
    np.save(tmp_path / "store" / LABELS, labels)
    with pytest.raises(DataError, match=r"labels\.npy does not hold the labels of this store"):
        FeatureStore(tmp_path / "store")


def test_other_classes_do_not_continue_a_store(images, tmp_path, make, pictures, extraction):
    make(images, tmp_path / "store").run()
    shutil.copytree(images / "n01", images / "n03")
    with pytest.raises(DataError, match="begun with another images, num_classes"):
        make(images, tmp_path / "store").run()
    with pytest.raises(DataError, match="begun with another images, caption_column"):
        extraction(pictures, tmp_path / "store", shard_images=2, square=True).run()


def test_a_store_of_captions_has_no_labels(store):
    features = FeatureStore(store)
    assert (features.labels, features.classes) == (None, ())
    assert features.load([0], seed=0, step=0).labels is None
    assert "num_classes" not in json.loads((store / MANIFEST).read_text())["identity"]


def test_workers_hand_over_labels(images, tmp_path, make):
    make(images, tmp_path / "store").run()
    store = FeatureStore(tmp_path / "store")
    steps = StepDataset(store, lambda step: [step, step + 5], seed=0)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(4), num_workers=1, multiprocessing_context="fork"
    )
    expected = [[label, list(FILES.values())[n + 5]] for n, label in enumerate([0, 1, 1, 1])]
    assert [batch.labels.tolist() for batch in loader] == expected


def test_online_labels_are_the_stores(images, tmp_path, make, encoder):
    (images / "n01" / "a" / "1.png").write_bytes(b"no picture")
    make(images, tmp_path / "store").run()
    store = FeatureStore(tmp_path / "store")
    table = bucket_table(256, square=True)
    online = pickle.loads(pickle.dumps(OnlineSource(ClassFolder(images), encoder, table)))
    online.encoder = encoder
    assert len(online) == len(store) == 8
    ids = [7, 1, 3, 0]
    fresh, kept = online.finish(online.load(ids, seed=1, step=2)), store.load(ids, seed=1, step=2)
    assert fresh.labels.tolist() == kept.labels.tolist() == [3, 1, 2, 0]
    assert torch.equal(fresh.prompt_mask, kept.prompt_mask) and kept.prompt_mask.shape == (4, 1)
    torch.testing.assert_close(fresh.latents, kept.latents, rtol=2e-3, atol=2e-3)  # float16


def test_a_class_objective_learns_from_it(images, tmp_path, make):
    make(images, tmp_path / "store").run()
    store = FeatureStore(tmp_path / "store")
    batch = store.load([0, 5, 8], seed=0, step=0)
    config = DiTConfig(num_classes=len(store.classes), num_layers=1, num_heads=2, head_dim=8)
    objective = ClassObjective(DiT(config), GaussianDiffusion(), label_dropout=0.0)
    losses = objective(batch, draw(0, 0, batch))
    losses["loss"].sum().backward()
    moved = objective.model.y_embedder.embedding_table.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, False, True, True, False]
