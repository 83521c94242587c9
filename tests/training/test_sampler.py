"""The bucket sampler: exact passes, equal shapes on every rank, and the two bugs it must not have.

Property tests run on random histograms of buckets, with buckets that are empty, hold one sample, or
hold fewer than a batch.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pixart_rt.buckets import buckets
from pixart_rt.errors import ConfigError
from pixart_rt.training.sampler import BucketSampler, permute

TOKENS = [bucket.num_tokens for bucket in buckets(256)]
GOLDEN_SMALL = [2, 9, 0, 1, 8, 5, 3, 7, 6, 4]
GOLDEN_LARGE = [3821489, 4452031, 8493279]
BUDGET = 24 * 256  # 24 images of the largest bucket, 26 of the smallest


def random_buckets(seed: int) -> np.ndarray:
    """Bucket ids of up to a few thousand samples, in an order that has nothing to do with them."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 3, 11, 64, 200], size=len(TOKENS), p=[0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    counts[rng.integers(len(TOKENS))] += 1 + rng.integers(50)  # never an empty data set
    return rng.permutation(np.repeat(np.arange(len(TOKENS), dtype=np.uint8), counts))


def make(seed: int, multiple: int = 4) -> BucketSampler:
    return BucketSampler(
        random_buckets(seed), TOKENS, token_budget=BUDGET, multiple=multiple, seed=seed
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4096, 4097])
def test_a_permutation_is_one(size: int) -> None:
    moved = permute(np.arange(size), size, (3, size))
    assert sorted(moved.tolist()) == list(range(size))
    one_by_one = [int(permute(np.array([i]), size, (3, size))[0]) for i in range(min(size, 50))]
    assert one_by_one == moved[:50].tolist()


def test_small_permutations_take_every_order_equally_often() -> None:
    size, draws, orders = 5, 10_000, 120
    seen = Counter(
        tuple(permute(np.arange(size), size, (11, key)).tolist()) for key in range(draws)
    )
    expected = draws / orders
    chi_square = sum(
        (seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(size))
    )
    freedom = orders - 1  # the sum has this mean and twice this variance
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_permutations_are_the_same_on_every_platform() -> None:
    """Integers only, so these values hold anywhere; a change of them breaks every resumed run."""
    assert permute(np.arange(10), 10, (0, 1, 2)).tolist() == GOLDEN_SMALL
    assert permute(np.array([0, 1, 9_999_999]), 10_000_000, (42, 7)).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("seed", range(6))
def test_every_pass_uses_every_sample_of_a_bucket_exactly_once(seed: int) -> None:
    sampler, owner = make(seed), random_buckets(seed)
    stream: dict[int, dict[int, np.ndarray]] = {}
    for step in range(sampler.steps_before(5)):
        batch = sampler.global_batch(step)
        assert (owner[batch.ids] == batch.bucket).all(), "a batch holds one bucket"
        number = _number_in_stream(sampler, step)
        assert number not in stream.setdefault(batch.bucket, {}), "a batch was used twice"
        stream[batch.bucket][number] = batch.ids
    for bucket, batches in stream.items():
        assert sorted(batches) == list(range(len(batches))), "a batch was left out"
        ids = np.concatenate([batches[number] for number in range(len(batches))])
        members = np.flatnonzero(owner == bucket)
        for start in range(0, len(ids) - len(members) + 1, len(members)):
            one_pass = ids[start : start + len(members)]
            np.testing.assert_array_equal(np.sort(one_pass), members)
        tail = ids[len(ids) // len(members) * len(members) :]
        assert len(set(tail.tolist())) == len(tail)


def _number_in_stream(sampler: BucketSampler, step: int) -> int:
    epoch = sampler.epoch_of(step)
    before, after = sampler._batches_before(epoch), sampler._batches_before(epoch + 1)
    return sampler._nth(step - sum(before), epoch, before, after)[1]


@pytest.mark.parametrize("seed", range(3))
def test_use_counts_after_some_epochs(seed: int) -> None:
    """The remainder rule: E or E - 1 times for a bucket that fills a batch, never lost for good."""
    sampler, owner, epochs = make(seed), random_buckets(seed), 20
    used = np.zeros(len(owner), np.int64)
    for step in range(sampler.steps_before(epochs)):
        np.add.at(used, sampler.ids(step), 1)
    for bucket, count in enumerate(sampler.counts):
        uses = used[owner == bucket]
        if count >= sampler.batch_sizes[bucket]:
            assert set(uses.tolist()) <= {epochs, epochs - 1}
        elif count:
            waiting = math.ceil(sampler.batch_sizes[bucket] / count)
            assert uses.min() >= epochs - waiting
            assert uses.max() <= epochs


@pytest.mark.parametrize("seed", range(3))
def test_the_order_does_not_depend_on_the_number_of_ranks(seed: int) -> None:
    sampler = make(seed, multiple=4)
    for step in range(0, sampler.steps_before(3), 3):
        whole = sampler.ids(step)
        for num_ranks in (1, 2, 4):
            parts = [sampler.ids(step, rank, num_ranks) for rank in range(num_ranks)]
            assert len({len(part) for part in parts}) == 1
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_ranks_have_equal_shapes_and_keep_the_budget() -> None:
    sampler, owner = make(1, multiple=4), random_buckets(1)
    for step in range(sampler.steps_before(2)):
        drawn = [owner[sampler.ids(step, rank, 4)] for rank in range(4)]
        assert len(np.unique(np.concatenate(drawn))) == 1
        tokens = 4 * len(drawn[0]) * TOKENS[drawn[0][0]]
        assert BUDGET - 4 * TOKENS[drawn[0][0]] < tokens <= BUDGET


def test_a_step_needs_no_history() -> None:
    """Resume is one integer: a new sampler asked for step 77 first gives what the old one gave."""
    old = make(2)
    walked = [old.ids(step) for step in range(80)]
    np.testing.assert_array_equal(make(2).ids(77), walked[77])


def test_seeds_and_epochs_differ() -> None:
    owner = np.zeros(640, np.int64)
    first, second = (
        BucketSampler(owner, [256], token_budget=64 * 256, seed=seed) for seed in (0, 1)
    )
    assert first.steps_before(1) == 10
    assert not np.array_equal(first.ids(0), second.ids(0))
    epochs = [[tuple(first.ids(10 * e + i).tolist()) for i in range(10)] for e in (0, 1)]
    assert not set(epochs[0]) & set(epochs[1]), "an epoch makes batches of its own"


def test_buckets_alternate_within_an_epoch() -> None:
    """Runs of one bucket would train on one shape for hours; a shuffled order has short ones."""
    owner = np.repeat(np.arange(4), 100 * 8)
    sampler = BucketSampler(owner, [256] * 4, token_budget=8 * 256)
    order = [sampler.global_batch(step).bucket for step in range(400)]
    longest = max(len(list(run)) for _, run in itertools.groupby(order))
    assert Counter(order) == {0: 100, 1: 100, 2: 100, 3: 100}
    assert longest < 12  # 400 fair draws from 4 reach a run of 12 about once in 50 000 tries


def test_leftovers_of_one_bucket_do_not_fill_another() -> None:
    """The original rebinds its list of left-over samples, so some come twice and others never."""
    owner = np.array([0] * 10 + [1] * 7 + [2] * 5)
    sampler = BucketSampler(owner, [256, 256, 256], token_budget=4 * 256)
    used: Counter[int] = Counter()
    for step in range(sampler.steps_before(4)):
        batch = sampler.global_batch(step)
        assert set(owner[batch.ids]) == {batch.bucket}
        used.update(batch.ids.tolist())
    # in four epochs: 40 of 10, 28 of 7 and 20 of 5 samples, all in whole batches of 4
    assert used == dict.fromkeys(range(22), 4)


def test_exposure_counts_all_images_not_the_first_third() -> None:
    """The original counts aspect ratios over the first third of the images only."""
    owner = np.array([20] * 300 + [3] * 300 + [35] * 300)  # each third has another shape
    sampler = BucketSampler(owner, TOKENS, token_budget=BUDGET, multiple=2)
    steps = sampler.steps_before(8)
    report = {each.bucket: each for each in sampler.exposure(steps) if each.samples}
    assert sorted(report) == [3, 20, 35]
    for each in report.values():
        assert each.samples == 300
        assert each.drawn == pytest.approx(8 * 300, abs=int(sampler.batch_sizes[each.bucket]))
        assert each.expected == pytest.approx(8 * 300, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_exposure_is_what_the_steps_drew(seed: int) -> None:
    sampler, owner = make(seed), random_buckets(seed)
    steps = sampler.steps_before(2) + sampler.steps_before(1) // 2 + 1  # ends inside an epoch
    drawn = np.zeros(len(TOKENS), np.int64)
    for step in range(steps):
        np.add.at(drawn, owner[sampler.ids(step)], 1)
    report = sampler.exposure(steps)
    assert [each.drawn for each in report] == drawn.tolist()
    assert sum(each.expected for each in report) == pytest.approx(drawn.sum())
    shares = np.bincount(owner, minlength=len(TOKENS)) / len(owner)
    assert [each.expected for each in report] == pytest.approx((shares * drawn.sum()).tolist())


def test_a_data_set_smaller_than_one_batch_still_trains() -> None:
    sampler = BucketSampler(np.zeros(3, np.int64), [256], token_budget=8 * 256, multiple=8)
    assert [sampler.epoch_of(step) for step in range(3)] == [2, 5, 7]
    assert Counter(sampler.ids(0).tolist() + sampler.ids(1).tolist() + sampler.ids(2).tolist()) == {
        0: 8, 1: 8, 2: 8,
    }  # fmt: skip


def test_ten_million_samples_cost_one_integer_each() -> None:
    owner = np.random.default_rng(0).integers(0, 40, 10_000_000, dtype=np.uint8)
    sampler = BucketSampler(owner, TOKENS, token_budget=384 * 256, multiple=8, seed=5)
    arrays = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 4 * len(owner) + 10_000
    batch = sampler.global_batch(sampler.steps_before(3) + 11)
    assert batch.epoch == 3
    assert (owner[batch.ids] == batch.bucket).all()
    assert len(set(batch.ids.tolist())) == len(batch.ids)


def test_another_process_draws_the_same() -> None:
    code = (
        "import numpy as np\n"
        "from pixart_rt.training.sampler import BucketSampler\n"
        "s = BucketSampler(np.arange(999) % 5, [256] * 5, token_budget=4096, seed=9)\n"
        "print(s.ids(123).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = BucketSampler(np.arange(999) % 5, [256] * 5, token_budget=4096, seed=9)
    assert done.stdout.strip() == str(here.ids(123).tolist())


@pytest.mark.parametrize(
    ("owner", "tokens", "budget", "multiple", "words"),
    [
        ([], [256], 4096, 1, "bucket of each sample"),
        ([0.5], [256], 4096, 1, "integers"),
        ([0, 2], [256, 256], 4096, 1, "buckets 0 to 2"),
        ([0, -1], [256], 4096, 1, "buckets -1 to 0"),
        ([0], [256], 255, 1, "at least 256"),
        ([0], [256], 1000, 4, "at least 1024"),
        ([0], [256], 4096, 0, "must be > 0"),
    ],
)
def test_what_cannot_be_is_refused(
    owner: list[float], tokens: list[int], budget: int, multiple: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        BucketSampler(owner, tokens, token_budget=budget, multiple=multiple)


def test_ranks_that_cannot_share_a_batch_are_refused() -> None:
    sampler = make(0, multiple=4)
    with pytest.raises(ConfigError, match="3 ranks cannot share"):
        sampler.ids(0, 0, 3)
    with pytest.raises(ConfigError, match="rank 2 was requested of 2"):
        sampler.ids(0, 2, 2)
    with pytest.raises(ConfigError, match="step -1"):
        sampler.ids(-1)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("count", [12, 13, 17, 23, 24, 25, 31, 36, 41, 100, 1000])
def test_no_step_has_a_sample_twice(count: int, multiple: int) -> None:
    """Also where a batch of 12 spans two passes."""
    sampler = BucketSampler(
        np.zeros(count, np.int64), [1], token_budget=12, multiple=multiple, seed=count
    )
    drawn: list[int] = []
    for number in range(400):
        batch = sampler._at(0, np.arange(number * 12, (number + 1) * 12, dtype=np.int64))
        assert len(set(batch.tolist())) == 12
        drawn += batch.tolist()
    whole = len(drawn) // count * count
    passes = np.array(drawn[:whole]).reshape(-1, count)
    assert (np.sort(passes) == np.arange(count)).all(), "a pass uses every sample exactly once"
    assert len({tuple(each) for each in passes.tolist()}) > len(passes) / 12 - 1, "they differ"
    one_by_one = [int(sampler._at(0, np.array([place]))[0]) for place in range(0, 400, 7)]
    assert one_by_one == drawn[:400:7]


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_a_bucket_smaller_than_a_step_repeats_evenly(count: int) -> None:
    sampler = BucketSampler(np.zeros(count, np.int64), [1], token_budget=12, seed=3)
    assert sampler.repeating() == [0]
    for number in range(100):
        batch = sampler._at(0, np.arange(number * 12, (number + 1) * 12, dtype=np.int64))
        uses = np.bincount(batch, minlength=count)
        assert uses.max() - uses.min() <= 1


def test_buckets_that_fill_a_step_or_are_empty_repeat_nothing() -> None:
    owner = np.repeat([0, 2], [12, 11])
    sampler = BucketSampler(owner, [1, 1, 1], token_budget=12)
    assert sampler.repeating() == [2]
