"""Which samples of a Source (data/loader.py) a step has, and what its dropped captions become."""

from __future__ import annotations

import torch
from torch import Tensor

from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import CfgNull
from pixart_rt.data.loader import Batches, Source
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.training.dropout import NullText, null_text
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.sampler import BucketSampler, RankIds


def sampler_of(
    source: Source, *, batch: int, base_size: int, multiple: int, seed: int
) -> BucketSampler:
    """Steps of the tokens of `batch` square images of base_size² tokens, over all ranks: more
    images of smaller buckets."""
    return BucketSampler(
        source.bucket_of,
        [bucket.num_tokens for bucket in source.buckets],
        token_budget=batch * base_size**2,
        multiple=multiple,
        seed=seed,
    )


def feed_of(source: Source, sampler: BucketSampler, ranks: Ranks, *, workers: int) -> Batches:
    """This rank's batches, read by so many processes."""
    ids = RankIds(sampler, ranks.rank, ranks.num_ranks)
    pin = ranks.device.type == "cuda"
    return Batches(source, ids, seed=sampler.seed, workers=workers, pin=pin)


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
