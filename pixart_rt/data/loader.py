"""Steps in, batches out: a feature store or an online source behind a torch DataLoader.

    sampler = BucketSampler(store.bucket_of, ...)                 # pixart_rt.training.sampler
    batches = Batches(store, lambda step: sampler.ids(step, rank, num_ranks), seed=0, workers=4)
    for batch in batches(start, stop): ...

A worker's item is a step, so workers share nothing and a run resumes by starting elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from pixart_rt.buckets import Bucket
from pixart_rt.data.batch import Batch
from pixart_rt.errors import DataError


class FeatureSource(Protocol):
    """What trains: samples by global id, each in a bucket. Stored or encoded on the fly."""

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        """[num_samples], indices into `buckets`."""

    def __len__(self) -> int: ...

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Any:
        """The part of the work that a worker process does."""

    def finish(self, loaded: Any) -> Batch:
        """The rest, in the process that trains."""


class StepDataset(Dataset[Any]):
    """Item `step` is source.load of that step's samples."""

    def __init__(
        self, source: FeatureSource, ids: Callable[[int], Iterable[int]], *, seed: int
    ) -> None:
        self.source, self.ids, self.seed = source, ids, seed

    def __getitem__(self, step: int) -> Any:
        """What the source loaded, or its DataError: raised here, it would become a traceback."""
        ids = [int(each) for each in self.ids(step)]
        try:
            return self.source.load(ids, seed=self.seed, step=step)
        except DataError as error:
            return error


class Batches:
    """The batches of a rank: batches(start, stop) gives those of the steps start..stop-1.

    ids: the samples of this rank at a step. workers: processes that read; 0 reads in this one.
    pin: into memory that a GPU copies from without waiting.
    """

    def __init__(
        self,
        source: FeatureSource,
        ids: Callable[[int], Iterable[int]],
        *,
        seed: int,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.source, self.workers, self.pin = source, workers, pin
        self.steps = StepDataset(source, ids, seed=seed)

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,  # fork and CUDA do not mix
        )
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            batch = self.source.finish(loaded)
            yield batch.pin_memory() if self.pin else batch
