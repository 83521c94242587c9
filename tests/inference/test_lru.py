"""The cache of prompts, texts, plans and graphs: its order, its bounds, its threads, its bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from pixart_rt.inference.lru import Lru
from pixart_rt.inference.prompt_embeds import PromptEmbeds


def test_the_longest_unused_goes_first() -> None:
    cache: Lru[str, str] = Lru(len, max_bytes=6)
    assert cache.put("a", "xx") == [] and cache.put("b", "yy") == [] and cache.put("c", "zz") == []
    assert cache.get("a") == "xx"
    assert cache.put("d", "www") == ["b", "c"], "7 bytes would be one too many"
    assert list(cache) == ["a", "d"] and cache.num_bytes == 5
    assert cache.get("b") is None and "b" not in cache and len(cache) == 2


def test_a_value_in_another_s_place_counts_once() -> None:
    cache: Lru[str, str] = Lru(len, max_bytes=10)
    for value in ("xxxx", "yyyyyy", "z"):
        assert cache.put("a", value) == []
    assert cache.num_bytes == 1 and cache.get("a") == "z"
    cache.remove(lambda key: key == "a")
    assert cache.num_bytes == 0 and not len(cache)


def test_the_latest_stays_whatever_its_size() -> None:
    cache: Lru[str, str] = Lru(len, max_bytes=3)
    cache.put("a", "x")
    assert cache.put("b", "y" * 9) == ["a"] and cache.get("b") == "y" * 9


def test_entries_are_bounded_too() -> None:
    cache: Lru[int, int] = Lru(max_entries=3)
    evicted = [key for number in range(6) for key in cache.put(number, number)]
    assert evicted == [0, 1, 2] and list(cache) == [3, 4, 5]
    cache.clear()
    assert not len(cache)


@pytest.fixture
def _busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_busy_switching")
def test_threads_may_share_it() -> None:
    """Once "OrderedDict mutated during iteration", and bytes that no longer add up."""
    cache: Lru[int, int] = Lru(lambda value: value, max_bytes=500)
    errors: list[Exception] = []

    def work(first: int) -> None:
        try:
            for step in range(3000):
                key = (first + step * 7) % 60
                if cache.get(key) is None:
                    cache.put(key, key)
                if step % 50 == 0:
                    cache.remove(lambda kept: kept % 9 == 0)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert cache.num_bytes == sum(cache) <= 500


def test_a_row_of_a_batch_owns_its_tensors() -> None:
    """A view kept the whole batch: 8 times its stated bytes at batch 8."""
    batch = PromptEmbeds(torch.randn(8, 5, 3), torch.ones(8, 5, dtype=torch.bool), (5,) * 8)
    for index, row in enumerate(batch.rows()):
        assert torch.equal(row.embeds[0], batch.embeds[index])
        for tensor in (row.embeds, row.mask):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert row.num_bytes == 5 * 3 * 4 + 5
    again = PromptEmbeds.cat(batch.rows())
    assert torch.equal(again.embeds, batch.embeds) and again.num_tokens == batch.num_tokens
