"""Warm-up in steps of the optimiser, whatever is accumulated and however many processes run."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.learning_rate import set_lr
from pixart_rt.training.optim.warmup import Warmup


def test_the_share_rises_to_one_and_stays():
    assert [Warmup(steps=4).share(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [Warmup(steps=2.5, from_zero=True).share(s) for s in range(4)] == [0, 0.4, 0.8, 1]
    for steps in (0, 1):
        assert [Warmup(steps=steps).share(step) for step in range(2)] == [1, 1]
    assert Warmup(from_zero=True).share(0) == 1, "no warm-up is none"


def test_accumulation_does_not_shorten_it():
    """The rate of a loop that accumulates 3 micro-batches is the rate of its optimiser steps."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    warmup, step, taken = Warmup(steps=5), 0, []
    for micro_batch in range(12):
        weight.sum().backward()
        if (micro_batch + 1) % 3 == 0:
            set_lr(optimizer, 2e-5 * warmup.share(step))
            before = weight.item()
            optimizer.step()
            optimizer.zero_grad()
            taken.append((before - weight.item()) / 3)
            step += 1
    assert taken == pytest.approx([2e-5 * share for share in (0.2, 0.4, 0.6, 0.8)], rel=1e-5)


def test_a_rate_that_is_a_tensor_is_filled():
    """Of every group, and in place: a captured or compiled step reads that tensor."""
    rate = torch.tensor(1.0)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    set_lr(optimizer, 0.25)
    assert rate.item() == 0.25
    assert [group["lr"] is rate for group in optimizer.param_groups] == [True, True]
    plain = torch.optim.AdamW(groups, lr=1.0)
    set_lr(plain, 0.5)
    assert [group["lr"] for group in plain.param_groups] == [0.5, 0.5]


def test_a_negative_warmup_is_refused():
    with pytest.raises(ConfigError, match=">= 0"):
        Warmup(steps=-1)
