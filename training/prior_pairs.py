"""Steps that pair each instance with a picture of its class, for prior preservation.

    batch of a step = i0, c0, i1, c1, ...        i of the instances' stream, c of the class's

Both streams are those of sampler.py, of the same bucket: the instances run through theirs as if
they were alone. Any run of an even length, such as a rank's share, has as many of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pixart_rt.errors import ConfigError
from pixart_rt.training.sampler import Array, BucketSampler


class PairedSampler(BucketSampler):
    """A BucketSampler whose even places are instances and whose odd ones are of their class.

    bucket_of: [num_samples], the first `num_instances` of which are instances. Every bucket in use
    must have both kinds. A step has `multiple` images or a multiple of it, an even number; exposure
    is counted as in BucketSampler, over both kinds. Raises ConfigError if they do not fit.
    """

    def __init__(
        self,
        bucket_of: npt.ArrayLike,
        num_instances: int,
        tokens: Sequence[int],
        *,
        token_budget: int,
        multiple: int = 2,
        seed: int = 0,
    ) -> None:
        if multiple % 2:
            raise ConfigError(f"pairs need a multiple of 2 images in a step, got {multiple}")
        owner = np.asarray(bucket_of)
        parts = owner[:num_instances], owner[num_instances:]
        counts = [np.bincount(part, minlength=len(tokens)) for part in parts]
        alone = np.flatnonzero((counts[0] > 0) != (counts[1] > 0))
        if len(alone):
            raise ConfigError(
                f"bucket {alone[0]} has instances without class pictures or the reverse; cut both "
                "to the same buckets"
            )
        super().__init__(owner, tokens, token_budget=token_budget, multiple=multiple, seed=seed)
        self.num_instances = num_instances
        self._kinds = [  # seeds differ, or equal counts would always pair the same
            BucketSampler(part, tokens, token_budget=token_budget, seed=2 * seed + kind)
            for kind, part in enumerate(parts)
        ]

    def _at(self, bucket: int, positions: Array) -> Array:
        found = np.empty_like(positions)
        for kind, first in enumerate((0, self.num_instances)):
            places = positions % 2 == kind
            found[places] = first + self._kinds[kind]._at(bucket, positions[places] // 2)
        return found
