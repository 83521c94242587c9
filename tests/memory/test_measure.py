"""The measurements themselves, on calls whose memory is known."""

from __future__ import annotations

import torch

from pixart_rt.memory.measure import peak_bytes

MIB = 1 << 20


def block(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def overlapping() -> torch.Tensor:
    """1, then 2 + 3 after the first is gone, then 3 + 1: never more than 5 MiB."""
    first = block(1)
    del first
    second, third = block(2), block(3)
    del second
    last = block(1)
    del third
    return last


def test_a_peak_is_the_most_held_at_once() -> None:
    assert peak_bytes(overlapping) == 5 * MIB
    assert peak_bytes(lambda: [block(1), block(2)]) == 3 * MIB
    assert peak_bytes(lambda: None) == 0


def test_what_the_caller_holds_does_not_count_but_a_view_of_it_is_free() -> None:
    held = block(4)
    assert peak_bytes(lambda: held.view(2, -1)[1]) == 0
    assert peak_bytes(lambda: held.float()) == 16 * MIB


def test_memory_inside_an_operator_counts() -> None:
    """Two float32 copies of a bfloat16 product's inputs, made inside and never returned."""
    x = torch.randn(512, 512)
    inside = peak_bytes(lambda: torch.linalg.cholesky(x @ x.T + 600 * torch.eye(512)))
    assert inside > 3 * x.nbytes
