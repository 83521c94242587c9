"""Which samples a step trains on: a pure function of (seed, step), with no state to save.

    stream(k)  = pass 0, pass 1, ... each a permutation of bucket k's n_k samples
    batch j(k) = positions j * b_k .. (j + 1) * b_k - 1 of stream(k)
    epoch e    = batches floor(e * n_k / b_k) .. floor((e + 1) * n_k / b_k) - 1 of every k, shuffled

All images of a step come from one bucket (paper, Section A.5), so every rank has the same shapes;
b_k images fill, but do not pass, a budget of tokens.

The remainder rule: what does not fill a batch is not dropped, it opens the bucket's first batch of
the next epoch. So a pass uses every sample exactly once, and after E epochs each sample of a bucket
with n_k >= b_k was used E or E - 1 times.

No step has a sample twice, not even where a batch spans two passes: with n_k >= 2 b_k what the
next pass would repeat there changes places with samples that follow; a smaller bucket keeps one
permutation for as many passes as end with a batch, so any n_k in a row are different. A bucket
smaller than its batch waits until enough passes fill one; it keeps its share of the images, and
repeats each as often as it must (`repeating`).

The global batch of a step does not depend on the number of ranks: rank r of R takes the r-th of R
equal runs of it. A run is resumed from its step alone, with any R that divides `multiple`.

Permutations are Feistel networks over integers (Luby & Rackoff, 1988) with cycle walking (Black &
Rogaway, 2002): position to sample and nothing else, equal on every platform. Memory is one integer
per sample, the samples sorted by bucket; nothing is drawn per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixart_rt.errors import ConfigError

Array = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

SAMPLE_ORDER = 2  # counts changes of what a step draws, none of which a run may be resumed over
ROUNDS = 8  # of the Feistel network
SMALLEST_HALF = 3  # bits; below, few items do not take all orders equally often (chi-square test)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_EPOCH_ORDER = 1 << 32  # the key of an epoch's order; buckets have their own number


def mix(words: Words) -> Words:
    """SplitMix64's finalizer (Steele et al., 2014): a bijection of 64-bit words, [n] to [n]."""
    words = words + _GAMMA  # arrays of integers wrap modulo 2**64, as is meant
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


def permute(positions: Array, size: int, key: tuple[int, ...]) -> Array:
    """Where a permutation of 0..size-1, chosen by `key`, sends `positions`; both [n] int64."""
    half = max(
        SMALLEST_HALF, ((size - 1).bit_length() + 1) // 2
    )  # bits of each side of the network
    keys = _round_keys(key)
    values = positions.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):  # a value outside 0..size-1 walks on until it comes back inside
        values[walking] = _feistel(values[walking], half, keys)
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: Words, half: int, keys: Words) -> Words:
    """A bijection of 0..4**half - 1."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(key: tuple[int, ...]) -> Words:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state ^ np.array([part % 2**64], np.uint64))
    return mix(state ^ (np.arange(1, ROUNDS + 1, dtype=np.uint64) << np.uint64(32)))


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One step's samples over all ranks: ids [b] int64, all of bucket `bucket`."""

    step: int
    epoch: int
    bucket: int
    ids: Array


@dataclass(frozen=True, slots=True)
class Exposure:
    """What a bucket has contributed: images drawn, against its share of the data set."""

    bucket: int
    samples: int  # in the data set
    steps: int
    drawn: int  # images, repeats counted
    expected: float  # of all images drawn, this bucket's share of the data set


class BucketSampler:
    """Steps to sample ids, for samples that belong to buckets of different token counts.

    bucket_of: [num_samples] integers, the bucket of every sample id, of the whole data set.
    tokens: tokens of an image by bucket. token_budget: the most tokens a step may have, over all
    ranks. multiple: a global batch is a multiple of this many images; the numbers of ranks (times
    accumulation) that a run may use are its divisors. Raises ConfigError if they do not fit.
    """

    def __init__(
        self,
        bucket_of: npt.ArrayLike,
        tokens: Sequence[int],
        *,
        token_budget: int,
        multiple: int = 1,
        seed: int = 0,
    ) -> None:
        owner = np.asarray(bucket_of)
        _check(owner, tokens, token_budget, multiple)
        self.seed, self.multiple = seed, multiple
        self.counts = np.bincount(owner, minlength=len(tokens)).astype(np.int64)
        self.batch_sizes = np.array(
            [token_budget // count // multiple * multiple for count in tokens], np.int64
        )
        self._starts = np.cumsum(self.counts) - self.counts
        small = np.uint32 if len(owner) < 2**32 else np.int64
        self._by_bucket = np.argsort(owner, kind="stable").astype(small)

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before this one: the step at which it begins."""
        return sum(self._batches_before(epoch))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to. Raises ConfigError for a negative step."""
        if step < 0:
            raise ConfigError(f"step {step} is not supported; steps count from 0")
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def global_batch(self, step: int) -> GlobalBatch:
        """The samples of a step over all ranks, in the order in which ranks divide them."""
        epoch = self.epoch_of(step)
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        bucket, number = self._nth(step - sum(before), epoch, before, after)
        size = int(self.batch_sizes[bucket])
        positions = np.arange(number * size, (number + 1) * size, dtype=np.int64)
        return GlobalBatch(step, epoch, bucket, self._at(bucket, positions))

    def ids(self, step: int, rank: int = 0, num_ranks: int = 1) -> Array:
        """The samples [b / num_ranks] int64 of one rank at a step.

        Raises ConfigError for a number of ranks that does not divide `multiple`.
        """
        if num_ranks < 1 or self.multiple % num_ranks:
            raise ConfigError(
                f"{num_ranks} ranks cannot share batches that are multiples of {self.multiple} "
                "images; use a number of ranks that divides it, or start a run with another one"
            )
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank {rank} was requested of {num_ranks}; ranks count from 0")
        batch = self.global_batch(step).ids
        share = len(batch) // num_ranks
        return batch[rank * share : (rank + 1) * share]

    def exposure(self, steps: int) -> list[Exposure]:
        """What every bucket contributed to the first `steps` steps, and what its share would be."""
        epoch = self.epoch_of(steps)
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        inside = np.arange(steps - sum(before), dtype=np.int64)
        buckets, _ = _locate(self._order(inside, epoch, sum(after) - sum(before)), before, after)
        batches = np.array(before) + np.bincount(buckets, minlength=len(before))
        drawn = batches * self.batch_sizes
        share = drawn.sum() / self.counts.sum()
        return [
            Exposure(bucket, int(count), int(batches[bucket]), int(drawn[bucket]), count * share)
            for bucket, count in enumerate(self.counts)
        ]

    def _batches_before(self, epoch: int) -> list[int]:
        """Batches of every bucket in all epochs before this one, in Python's exact integers."""
        return [
            epoch * int(count) // int(size)
            for count, size in zip(self.counts, self.batch_sizes, strict=True)
        ]

    def _order(self, places: Array, epoch: int, steps: int) -> Array:
        """The shuffled numbers 0..steps-1 of an epoch's batches at these places."""
        return permute(places, steps, (self.seed, _EPOCH_ORDER, epoch))

    def _nth(self, place: int, epoch: int, before: list[int], after: list[int]) -> tuple[int, int]:
        """The bucket of an epoch's place-th batch, and the batch's number in its stream."""
        shuffled = self._order(np.array([place], np.int64), epoch, sum(after) - sum(before))
        buckets, numbers = _locate(shuffled, before, after)
        return int(buckets[0]), int(numbers[0])

    def repeating(self) -> list[int]:
        """The buckets with fewer samples than a batch, whose steps repeat some."""
        short = (self.counts > 0) & (self.counts < self.batch_sizes)
        return [int(bucket) for bucket in np.flatnonzero(short)]

    def _at(self, bucket: int, positions: Array) -> Array:
        """The sample ids at positions of a bucket's stream."""
        count, size = int(self.counts[bucket]), int(self.batch_sizes[bucket])
        found = np.empty_like(positions)
        passes = positions // count
        for each in np.unique(passes):
            inside = passes == each
            within = positions[inside] - each * count
            if count < 2 * size:
                group = int(each) // (size // math.gcd(count, size))
                places = permute(within, count, (self.seed, bucket, group))
            else:
                places = self._without_repeats(bucket, int(each), within)
            found[inside] = self._by_bucket[int(self._starts[bucket]) + places]
        return found

    def _without_repeats(self, bucket: int, number: int, within: Array) -> Array:
        """Where pass `number` of a bucket sends positions, by its permutation, but for its first b:
        those that end the batch of the pass before are none that this batch has already.

        At most t of the b places, t begun before, hold what the batch has; so as many of the first
        b - t as hold it find a partner among the t that follow. The last b of the pass stay.
        """
        count, size = int(self.counts[bucket]), int(self.batch_sizes[bucket])
        places = permute(within, count, (self.seed, bucket, number))
        begun = number * count % size
        if begun and number and within.min() < size:
            last = np.arange(count - begun, count, dtype=np.int64)
            before = permute(last, count, (self.seed, bucket, number - 1))
            first = permute(np.arange(size, dtype=np.int64), count, (self.seed, bucket, number))
            taken = np.isin(first, before)
            rest = size - begun  # places that end the batch
            wrong = np.flatnonzero(taken[:rest])
            partners = rest + np.flatnonzero(~taken[rest:])[: len(wrong)]
            first[wrong], first[partners] = first[partners], first[wrong]
            changed = within < size
            places[changed] = first[within[changed]]
        return places


@dataclass(frozen=True, slots=True)
class RankIds:
    """A rank's samples by step, as a callable that worker processes can be given."""

    sampler: BucketSampler
    rank: int
    num_ranks: int

    def __call__(self, step: int) -> Array:
        """[b / num_ranks] int64."""
        return self.sampler.ids(step, self.rank, self.num_ranks)


def _locate(numbers: Array, before: list[int], after: list[int]) -> tuple[Array, Array]:
    """The bucket of each of an epoch's batches, counted bucket by bucket, and its own number."""
    first: Array = np.array(before, np.int64)
    last: Array = np.array(after, np.int64)
    ends: Array = (last - first).cumsum()
    buckets: Array = np.searchsorted(ends, numbers, side="right").astype(np.int64)
    return buckets, last[buckets] - (ends[buckets] - numbers)


def _check(
    owner: npt.NDArray[np.integer], tokens: Sequence[int], token_budget: int, multiple: int
) -> None:
    if owner.ndim != 1 or not len(owner) or not np.issubdtype(owner.dtype, np.integer):
        raise ConfigError(
            f"a sampler needs the bucket of each sample, integers [num_samples]; got {owner.dtype} "
            f"{list(owner.shape)}"
        )
    if owner.min() < 0 or owner.max() >= len(tokens):
        raise ConfigError(
            f"samples are in buckets {owner.min()} to {owner.max()}, but there are {len(tokens)} "
            "buckets, counted from 0"
        )
    if min(tokens) < 1 or multiple < 1:
        raise ConfigError(f"tokens ({min(tokens)} at least) and multiple ({multiple}) must be > 0")
    if token_budget < max(tokens) * multiple:
        raise ConfigError(
            f"a budget of {token_budget} tokens does not hold {multiple} images of {max(tokens)} "
            f"tokens; use at least {max(tokens) * multiple}, or a smaller multiple"
        )
