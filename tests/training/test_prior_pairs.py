"""Pairs of instances and class pictures: both streams whole, on any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pixart_rt.errors import ConfigError
from pixart_rt.training.prior_pairs import PairedSampler

TOKENS = [256, 250, 240]
OWNER = [0, 0, 2, 0, 2, *(0, 2, 2, 0, 0, 2, 0, 2, 2)]  # 5 instances, 9 of the class; none in 1
BUDGET = 4 * 256


def sampler(seed=0, **settings):
    return PairedSampler(OWNER, 5, TOKENS, **{"token_budget": BUDGET, "seed": seed, **settings})


def test_every_step_pairs_within_one_bucket():
    for step in range(40):
        batch = sampler().global_batch(step)
        assert len(batch.ids) == 4
        assert {OWNER[sample] for sample in batch.ids} == {batch.bucket}
        assert (batch.ids[0::2] < 5).all()
        assert (batch.ids[1::2] >= 5).all()


def test_instances_take_turns():
    """After whole passes each instance of a bucket was used equally often, and the class too."""
    used = Counter()
    steps = sampler().steps_before(60)
    for step in range(steps):
        used.update(sampler().global_batch(step).ids.tolist())
    for bucket in (0, 2):
        for kind in (range(5), range(5, len(OWNER))):
            counts = [used[sample] for sample in kind if OWNER[sample] == bucket]
            assert max(counts) - min(counts) <= 1
            assert min(counts) > 20


def test_pairs_vary():
    """Two of each: with one key for both kinds, instance 0 would always meet picture 2."""
    twins = PairedSampler([0, 0, 0, 0], 2, [256], token_budget=512)
    pairs = {tuple(twins.global_batch(step).ids) for step in range(40)}
    assert pairs == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_ranks_share_whole_pairs():
    paired = sampler(multiple=4)
    for step in range(10):
        parts = [paired.ids(step, rank, 2) for rank in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), paired.global_batch(step).ids)
        for part in parts:
            assert (part[0::2] < 5).all()
            assert (part[1::2] >= 5).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="multiple of 2"):
        sampler(multiple=3)
    with pytest.raises(ConfigError, match="bucket 1 has instances without"):
        PairedSampler([0, 1, 0], 2, TOKENS, token_budget=BUDGET)
    with pytest.raises(ConfigError, match="bucket 0 has instances without"):
        PairedSampler([0, 0], 2, TOKENS, token_budget=BUDGET)
