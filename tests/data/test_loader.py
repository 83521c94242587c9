"""One protocol of training samples: what every source says of itself, and batches behind it."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.data.control import ControlledSource
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.edges import EdgeKind, edge_finder
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.instances import captioned_pictures, encode_instances
from pixart_rt.data.loader import Batches
from pixart_rt.data.online import OnlineSource
from pixart_rt.data.store import FeatureStore

TABLE = bucket_table(256, square=False)


@pytest.fixture
def sources(store, pictures, encoder):
    """sources(folder=None): one of each kind; of another folder, those that read pictures."""

    def make(folder=None):
        images = ImageFolder(folder or pictures)
        online = OnlineSource(images, encoder, TABLE)
        found = {
            "online": online,
            "controlled": ControlledSource(online, edge_finder(EdgeKind.CANNY)),
            "instances": encode_instances(encoder, TABLE, captioned_pictures(images.root)),
        }
        return found if folder else {"store": FeatureStore(store), **found}

    return make


def test_every_source_is_known_by_its_samples(sources, draw_images, tmp_path):
    first, again = sources(), sources()
    other = sources(draw_images(tmp_path / "images", 3, seed=1))
    names = {name: source.identity for name, source in first.items()}
    assert len(set(names.values())) == 4
    assert {name: source.identity for name, source in again.items()} == names
    assert all(source.identity != names[name] for name, source in other.items())


def test_every_source_gives_batches_and_the_empty_prompt(sources, encoder):
    """Oracle: the text encoder. Batches are of the ids of their step."""
    (empty,), _ = encoder.text([""])
    for name, source in sources().items():
        torch.testing.assert_close(source.empty_prompt, empty, msg=name)
        first, second = Batches(source, lambda step: [step + 3], seed=0)(1, 3)
        assert (first.ids.tolist(), second.ids.tolist()) == ([4], [5])
        assert first.bucket == source.buckets[source.bucket_of[4]], name
