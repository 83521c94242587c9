"""Steps in, batches out: a feature store or an online source behind a torch DataLoader.

    sampler = BucketSampler(store.bucket_of, ...)                 # pixart_rt.training.sampler
    steps = StepDataset(store, lambda step: sampler.ids(step, rank, num_ranks), seed=0)
    loader = DataLoader(steps, batch_size=None, sampler=range(start, stop), num_workers=4)
    for loaded in loader:
        batch = store.finish(loaded).to(device)

An item is a step, so workers share nothing and a run resumes by starting the range elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from pixart_rt.batch import Batch
from pixart_rt.buckets import Bucket


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
        self, source: FeatureSource, ids: Callable[[int], Sequence[int]], *, seed: int
    ) -> None:
        self.source, self.ids, self.seed = source, ids, seed

    def __getitem__(self, step: int) -> Any:
        return self.source.load(self.ids(step), seed=self.seed, step=step)
