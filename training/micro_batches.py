"""The micro-batches of a step: equal parts, as many on every rank, small enough for a GPU's memory.

Imports no torch.
"""

from __future__ import annotations

from pixart_rt.errors import ConfigError


def count_micro_batches(
    batch: int, num_ranks: int, *, asked: int | None = None, most: int | None = None
) -> int:
    """The micro-batches of a step of `batch` images, over all ranks.

    As many as were requested; else the fewest of at most `most` images each (None: one a rank).
    Raises ConfigError where the batch does not divide.
    """
    if asked is not None:
        if asked % num_ranks:
            raise ConfigError(
                f"`micro_batches` {asked} was requested on {num_ranks} ranks, which run equally "
                "many; choose a multiple of the ranks"
            )
        if batch % asked:
            raise ConfigError(
                f"`micro_batches` {asked} was requested, but a step of {batch} images does not "
                "divide into so many equal parts; choose a divisor, or another `batch`"
            )
        return asked
    if batch % num_ranks:
        raise ConfigError(
            f"a step of {batch} images does not divide among {num_ranks} ranks; choose a multiple "
            "as `batch`"
        )
    share = batch // num_ranks  # images of a rank
    fewest = 1 if most is None else -(-share // most)
    parts = next(parts for parts in range(fewest, share + 1) if share % parts == 0)
    return parts * num_ranks
