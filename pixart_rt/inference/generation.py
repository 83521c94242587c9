"""The work of one call: requests resolved, batched, denoised, decoded and finished, in order.

A call, `generate_many` and `stream` run the same `make`; which images share a batch differs.

Functions of a pipeline, in whose turn they run (call_state.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.config import SamplingConfig, Saving
from pixart_rt.errors import ConfigError, NumericsError
from pixart_rt.inference.batching import chunks, image_inputs, shared_batches
from pixart_rt.inference.call_state import Call
from pixart_rt.inference.decoding import decode, finish, together
from pixart_rt.inference.denoiser import After, Denoised, ImageInputs
from pixart_rt.inference.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from pixart_rt.inference.pipeline import PixArtPipeline

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 4  # of `work_each`, whose prompts are encoded together; XL: 2 MB each
StepCallback = Callable[
    ["PixArtPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOutput:
    """Images in the asked form, and what made each of them."""

    images: Any  # list of PIL images, or a tensor [B, ...] for output_type "pt" and "latent"
    prompts: list[str]
    seeds: list[int]  # also those that were drawn; of a generator its initial one
    bucket: Bucket
    skipped_steps: list[tuple[int, ...]]  # of each image, from 0; empty unless `approximate`


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    """One image of `stream`, or why there is none."""

    index: int  # of its request among those that were given
    request: Request  # whose `seed` says what was drawn
    image: Any  # PIL, or an array or tensor [1, ...]; None with an error
    error: NumericsError | None
    bucket: Bucket
    sampling: SamplingConfig
    skipped_steps: tuple[int, ...]  # from 0; empty unless `approximate`


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """All that is to be made, in batches of indices of `resolved`."""

    resolved: Sequence[ResolvedRequest]
    batches: Sequence[Sequence[int]]
    output_type: str
    callback: StepCallback | None = None
    vae_tiling: bool | None = None  # as the pipeline's
    ahead: int = BATCHES_AHEAD  # batches whose prompts are encoded together


def work_alike(
    pipe: PixArtPipeline, requests: Sequence[Request], output_type: str, **settings: Any
) -> Work:
    """Requests that differ in text, seed and control image alone, in their order."""
    resolved = resolve(pipe, requests)
    batches = chunks(range(len(resolved)), pipe.max_batch)
    return Work(resolved=resolved, batches=batches, output_type=output_type, ahead=len(batches),
                **settings)  # fmt: skip


def work_each(
    pipe: PixArtPipeline, requests: Sequence[Request], output_type: str, **settings: Any
) -> Work:
    """Any requests, in batches of those that can share one. A callback is given one shape."""
    resolved = resolve(pipe, requests)
    mixes = pipe.denoiser.mixes if settings.get("callback") is None else lambda _: False
    batches = shared_batches(resolved, pipe.max_batch, mixes)
    return Work(resolved=resolved, batches=batches, output_type=output_type, **settings)


def make(pipe: PixArtPipeline, work: Work, call: Call) -> Iterator[list[ImageResult]]:
    """The images of one batch after the other, each finished before the next batch begins."""
    resolved = work.resolved
    call.expect(sum(resolved[batch[0]].sampling.num_inference_steps for batch in work.batches))
    after = None if work.callback is None else _after(pipe, work.callback)
    for ahead in chunks(work.batches, work.ahead):
        pipe.request_text.begin()
        indices = [index for batch in ahead for index in batch]
        inputs = make_inputs(pipe, [resolved[index] for index in indices])
        ready = dict(zip(indices, inputs, strict=True))
        for batch in ahead:
            sampling = resolved[batch[0]].sampling
            before = call.batch(sampling.num_inference_steps)
            made = pipe.denoiser([ready.pop(index) for index in batch], sampling, before, after)
            call.decoding()
            yield [
                _result(pipe, work, index, image, made.skipped_steps)
                for index, image in zip(batch, _decoded(pipe, work, batch, made), strict=True)
            ]


def output(results: Sequence[ImageResult], output_type: str) -> PipelineOutput:
    """What a call returns, of images of one size."""
    return PipelineOutput(
        images=together([result.image for result in results], output_type),
        prompts=[result.request.prompt or "" for result in results],
        seeds=[result.request.seed for result in results if result.request.seed is not None],
        bucket=results[0].bucket,
        skipped_steps=[result.skipped_steps for result in results],
    )


def in_order(results: Sequence[ImageResult]) -> list[Any]:
    """The images by their requests' order; in place of one that failed its error.

    Raises the first error where no image came.
    """
    errors = [result.error for result in results if result.error is not None]
    if errors and len(errors) == len(results):
        raise errors[0]
    for error in errors:
        logger.warning("%d of %d images failed: %s", len(errors), len(results), error)
    ordered = sorted(results, key=lambda result: result.index)
    return [result.image if result.error is None else result.error for result in ordered]


def resolve(pipe: PixArtPipeline, requests: Sequence[Request]) -> list[ResolvedRequest]:
    """The requests with the bundle's defaults. Raises ConfigError for what it cannot do."""
    resolved = [request.resolved(pipe.manifest) for request in requests]
    for each in resolved:
        pipe.denoiser.check(each.sampling)
        pipe.controls.check(each.request)
    return resolved


def make_inputs(pipe: PixArtPipeline, resolved: Sequence[ResolvedRequest]) -> list[ImageInputs]:
    """What the denoiser takes for each request."""
    whole = Saving.SHORT_TEXT not in pipe.denoiser.savings
    return image_inputs(resolved, pipe.request_text, pipe.controls, whole=whole)


def _after(pipe: PixArtPipeline, callback: StepCallback) -> After:
    """The caller's callback as the denoiser calls it."""

    def after(step: int, timestep: Tensor, latents: Tensor, denoised: Tensor) -> Tensor:
        returned = callback(pipe, step, timestep, {"latents": latents, "denoised": denoised})
        changed = latents if returned is None else returned.get("latents", latents)
        if changed.shape != latents.shape:
            raise ConfigError(
                f"callback_on_step_end returned latents {list(changed.shape)} at step {step}; "
                f"return {list(latents.shape)}, or nothing"
            )
        return changed

    return after


def _decoded(
    pipe: PixArtPipeline, work: Work, batch: Sequence[int], made: Denoised
) -> Iterator[Tensor]:
    """Each image [1, ...] of a batch; neighbours of one shape in one call of the decoder."""
    if work.output_type == "latent":
        yield from made.latents
        return
    tiled = pipe.vae_tiling if work.vae_tiling is None else work.vae_tiling
    profiles = pipe.manifest.components["vae_decoder"].profiles
    pairs = zip(batch, made.latents, strict=True)
    for _, alike in groupby(pairs, key=lambda pair: work.resolved[pair[0]].bucket):
        latents = torch.cat([each for _, each in alike])
        yield from decode(latents, pipe.vae_decoder, profiles, tiled=tiled).split(1)


def _result(
    pipe: PixArtPipeline, work: Work, index: int, image: Tensor, skipped: tuple[int, ...]
) -> ImageResult:
    resolved = work.resolved[index]
    request, sampling = resolved.request, resolved.sampling
    made_by = f"{pipe.manifest.model['name']}, {sampling.scheduler}, seed {request.seed}"
    finished, failed = None, None
    try:
        finished = finish(image, request.height, request.width, work.output_type, made_by)
    except NumericsError as error:
        failed = error
    return ImageResult(
        index=index,
        request=request,
        image=finished,
        error=failed,
        bucket=resolved.bucket,
        sampling=sampling,
        skipped_steps=skipped,
    )
