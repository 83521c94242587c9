"""The arena's rules, with tenants and streams that record what happens to them."""

from __future__ import annotations

import gc

import pytest
import torch

from pixart_rt.backends.trt.arena import Arena
from pixart_rt.errors import BackendError


class Stream:
    """A CUDA stream's part in ordering."""

    def __init__(self, device: object = None) -> None:
        self.device = torch.device("cpu")
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class Tenant:
    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    def use_memory(self, address: int, size: int) -> None:
        self.places.append((address, size))


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return Arena(torch.device("cpu"))


def test_the_block_is_the_largest_tenant_s_not_the_sum(arena: Arena) -> None:
    tenants = [Tenant(), Tenant(), Tenant()]
    for tenant, size in zip(tenants, (1000, 5000, 200), strict=True):
        arena.admit(tenant, size)
    assert arena.size == 5000
    last = {tenant.places[-1] for tenant in tenants}
    assert len(last) == 1, "all work in one place"
    assert last.pop()[1] == 5000


def test_growing_moves_those_who_are_there(arena: Arena) -> None:
    first, second = Tenant(), Tenant()
    arena.admit(first, 100)
    assert [size for _, size in first.places] == [100]
    arena.admit(second, 1 << 20)
    assert [size for _, size in first.places] == [100, 1 << 20]
    assert first.places[-1] == second.places[-1]
    arena.admit(Tenant(), 5)
    assert len(first.places) == 2, "nobody moves without need"


def test_growing_waits_for_the_device_and_frees_the_old_block_first(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena.admit(Tenant(), 100)
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("waited"))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (seen.append(arena.size), real(*a, **k))[1])
    arena.admit(Tenant(), 200)
    assert seen == ["waited", 0]


def test_a_tenant_that_is_gone_is_not_moved_and_not_kept(arena: Arena) -> None:
    tenant = Tenant()
    places = tenant.places
    arena.admit(tenant, 10)
    del tenant
    gc.collect()
    arena.admit(Tenant(), 20)
    assert len(places) == 1


def test_a_tenant_without_activations_gets_an_address(arena: Arena) -> None:
    tenant = Tenant()
    arena.admit(tenant, 0)
    assert tenant.places[0][0] != 0


def test_work_waits_only_when_the_stream_changes(arena: Arena) -> None:
    first, second = Stream(), Stream()
    for stream in (first, first, second, second, first):
        arena.take(stream)
    assert second.waited == [first]
    assert first.waited == [second]


def test_no_memory_is_a_line_that_says_what_to_do(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(BackendError, match=r"2\.0 GiB .*smaller --max-batch"):
        arena.admit(Tenant(), 2 << 30)
