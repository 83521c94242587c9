"""Steps in, batches out: the samples of a Source behind a torch DataLoader.

    sampler = BucketSampler(store.bucket_of, ...)                 # pixart_rt.training.sampler
    batches = Batches(store, lambda step: sampler.ids(step, rank, num_ranks), seed=0, workers=4)
    for batch in batches(start, stop): ...

Sources are feature stores (store.py), pictures encoded at every use (online.py), both with control
images (control.py), and a few pictures in memory (instances.py). Training knows this protocol only.

A worker's item is a step, so workers share nothing and a run resumes by starting elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart_rt.buckets import Bucket
from pixart_rt.data.batch import Batch
from pixart_rt.errors import DataError


class Source(Protocol):
    """Training samples by global id, each in a bucket."""

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    @property
    def bucket_of(self) -> npt.NDArray[np.integer]:
        """[num_samples], indices into `buckets`."""

    @property
    def empty_prompt(self) -> Tensor:
        """T5(""), the text of a dropped caption: [n, E]."""

    @property
    def identity(self) -> str:
        """Changes when the samples do: a run resumes only with the same."""

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Any:
        """The part of the work that a worker process does."""

    def finish(self, loaded: Any) -> Batch:
        """The rest, in the process that trains."""


def identity_of(about: Mapping[str, object]) -> str:
    """A short name for what samples depend on."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StepDataset(Dataset[Any]):
    """Item `step` is source.load of that step's samples."""

    def __init__(self, source: Source, ids: Callable[[int], Iterable[int]], *, seed: int) -> None:
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
        source: Source,
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
