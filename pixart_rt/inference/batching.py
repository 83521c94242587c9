"""Requests into batches: which images share one, and what each is made from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from pixart_rt.approximations import FirstBlockCache
from pixart_rt.config import SamplingConfig
from pixart_rt.inference.control import Controls
from pixart_rt.inference.denoiser import ImageInputs
from pixart_rt.inference.request import ResolvedRequest
from pixart_rt.inference.request_text import RequestText, Text

T = TypeVar("T")


def chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """Neighbours, at most `size` together."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def shared_batches(
    requests: Sequence[ResolvedRequest], max_batch: int, mixes: Callable[[SamplingConfig], bool]
) -> list[Sequence[int]]:
    """The indices of each batch: images of equal settings but for guidance's scale, and of equal
    token counts, or where `mixes` is false of one shape. Groups come in the order of their first
    images, and images of a group in theirs.

    With a first-block cache an image is alone: it would depend on its batch.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, request in enumerate(requests):
        sampling, bucket = request.sampling, request.bucket
        if isinstance(sampling.approximate, FirstBlockCache):
            groups[index] = [index]
            continue
        mixed = sampling.approximate is None and mixes(sampling)
        shape = bucket.num_tokens if mixed else bucket
        settings = replace(sampling, guidance_scale=2.0 if sampling.guided else 1.0)
        groups.setdefault((shape, settings), []).append(index)
    return [batch for members in groups.values() for batch in chunks(members, max_batch)]


def image_inputs(
    requests: Sequence[ResolvedRequest], text: RequestText, controls: Controls, *, whole: bool
) -> list[ImageInputs]:
    """What each image is made from; their texts are encoded together.

    whole: see PromptEncoder.
    """
    texts: dict[int, Text] = {}
    for guided in (True, False):
        indices = [
            index for index, request in enumerate(requests) if request.sampling.guided is guided
        ]
        asked = [requests[index].request for index in indices]
        found = text(asked, guided=guided, whole=whole) if asked else []
        texts.update(zip(indices, found, strict=True))
    latents = controls([each.request for each in requests], [each.bucket for each in requests])
    inputs = []
    for index, resolved in enumerate(requests):
        assert resolved.request.seed is not None, "a request draws it"
        inputs.append(
            ImageInputs(
                bucket=resolved.bucket,
                seed=resolved.request.seed,
                guidance_scale=resolved.sampling.guidance_scale,
                prompt=texts[index][0],
                negative=texts[index][1],
                control=latents[index],
                generator=resolved.request.generator,
            )
        )
    return inputs
