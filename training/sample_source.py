"""Where a run's samples come from, which of them a step has, and what its dropped captions become.

Source      anything with samples in buckets and T5(""): training never knows stores or encoders
sampler_of  steps of about `batch` images at the model's resolution, more of smaller buckets
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import CfgNull
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.training.dropout import NullText, null_text
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.sampler import BucketSampler, RankIds
from pixart_rt.training.trainer import Feed


class Source(Protocol):
    """The samples of a run."""

    @property
    def buckets(self) -> Sequence[Bucket]: ...

    @property
    def bucket_of(self) -> npt.NDArray[np.integer]:
        """[num_samples], indices into `buckets`."""

    @property
    def empty_prompt(self) -> Tensor:
        """T5("") [n, E]."""

    @property
    def identity(self) -> str:
        """Changes when the samples do."""

    def feed(self, ids: Callable[[int], npt.NDArray[np.int64]], seed: int) -> Feed:
        """The batches of the samples that `ids` gives for a step."""


def sampler_of(
    source: Source, *, batch: int, base_size: int, multiple: int, seed: int
) -> BucketSampler:
    """Steps of the tokens of `batch` square images of base_size² tokens, over all ranks."""
    return BucketSampler(
        source.bucket_of,
        [bucket.num_tokens for bucket in source.buckets],
        token_budget=batch * base_size**2,
        multiple=multiple,
        seed=seed,
    )


def feed_of(source: Source, sampler: BucketSampler, ranks: Ranks) -> Feed:
    """This rank's batches."""
    return source.feed(RankIds(sampler, ranks.rank, ranks.num_ranks), sampler.seed)


def null_of(start: TransformerCheckpoint, empty_prompt: Tensor) -> NullText:
    """What dropped captions become, by the model's convention; empty_prompt is T5("") [n, E].

    Raises ConfigError where features cannot tell, DataError for those of another text encoder.
    """
    config, found = start.config, empty_prompt.float()
    if config.cfg_null is CfgNull.EMPTY_PROMPT_CAPTION_MASK:
        raise ConfigError(
            f"cfg_null {config.cfg_null} needs T5's output at padding, which features do not keep; "
            f"train with {CfgNull.EMPTY_PROMPT} or {CfgNull.Y_EMBEDDING}"
        )
    if found.shape[1] != config.caption_channels:
        raise DataError(
            f"the data's text is {found.shape[1]} wide, the model takes {config.caption_channels}; "
            "extract it with the model's text encoder"
        )
    T = config.max_text_tokens
    embeds = torch.zeros(T, config.caption_channels)
    embeds[: len(found)] = found
    return null_text(
        config.cfg_null,
        empty_prompt=(embeds, torch.arange(T) < len(found)),
        y_embedding=start.y_embedding,
    )
