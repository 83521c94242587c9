"""The work of one call: requests resolved, batched, denoised, decoded and finished, in that order.

Functions of a pipeline, in whose turn they run (call_state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixart_rt.approximations import FirstBlockCache
from pixart_rt.buckets import Bucket
from pixart_rt.config import SamplingConfig, Saving
from pixart_rt.errors import ConfigError
from pixart_rt.inference.batching import chunks, image_inputs, shared_batches
from pixart_rt.inference.call_state import Call
from pixart_rt.inference.decoding import decode, finish
from pixart_rt.inference.denoiser import After, ImageInputs
from pixart_rt.inference.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from pixart_rt.inference.pipeline import PixArtPipeline

BATCHES_AHEAD = 4  # of `generate_each`, whose prompts are encoded together; XL: 2 MB each
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


def generate_alike(
    pipe: PixArtPipeline,
    requests: Sequence[Request],
    call: Call,
    callback: StepCallback | None,
    output_type: str,
    vae_tiling: bool | None,
) -> PipelineOutput:
    """The images of requests that differ in text, seed and control image alone."""
    resolved = resolve(pipe, requests)
    request, sampling = resolved[0].request, resolved[0].sampling
    pipe.request_text.begin()
    batches = chunks(make_inputs(pipe, resolved), pipe.max_batch)
    call.expect(sampling.num_inference_steps * len(batches))
    after = None if callback is None else _after(pipe, callback)
    images, skipped = [], []
    for batch in batches:
        before = call.batch(sampling.num_inference_steps)
        made = pipe.denoiser(batch, sampling, before, after)
        skipped += [made.skipped_steps] * len(batch)
        call.decoding()
        images.append(_decoded(pipe, torch.cat(made.latents), output_type, vae_tiling))
    maker = _maker(pipe, sampling)
    return PipelineOutput(
        images=finish(images, request.height, request.width, output_type, maker),
        prompts=[request.prompt or "" for request in requests],
        seeds=[request.seed for request in requests if request.seed is not None],
        bucket=resolved[0].bucket,
        skipped_steps=skipped,
    )


def generate_each(
    pipe: PixArtPipeline, requests: Sequence[Request], call: Call, output_type: str
) -> list[Any]:
    """The image of each request, in batches of those that can share one."""
    for request in requests:
        if isinstance(request.approximate, FirstBlockCache):
            raise ConfigError(
                f"{request.approximate} was asked of generate_many, whose images must not "
                "depend on their batch; use a step cache, or call the pipeline for each"
            )
    resolved = resolve(pipe, requests)
    batches = shared_batches(resolved, pipe.max_batch, pipe.denoiser.mixes)
    call.expect(sum(resolved[batch[0]].sampling.num_inference_steps for batch in batches))
    done: list[Any] = [None] * len(resolved)
    for ahead in chunks(batches, BATCHES_AHEAD):
        pipe.request_text.begin()
        indices = [index for batch in ahead for index in batch]
        inputs = make_inputs(pipe, [resolved[index] for index in indices])
        ready = dict(zip(indices, inputs, strict=True))
        for batch in ahead:
            sampling = resolved[batch[0]].sampling
            before = call.batch(sampling.num_inference_steps)
            made = pipe.denoiser([ready[index] for index in batch], sampling, before, None)
            call.decoding()
            for index, latents in zip(batch, made.latents, strict=True):
                done[index] = _one(pipe, latents, resolved[index], output_type)
    return done


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
    pipe: PixArtPipeline, latents: Tensor, output_type: str, vae_tiling: bool | None = None
) -> Tensor:
    if output_type == "latent":
        return latents
    tiled = pipe.vae_tiling if vae_tiling is None else vae_tiling
    profiles = pipe.manifest.components["vae_decoder"].profiles
    return decode(latents, pipe.vae_decoder, profiles, tiled=tiled)


def _one(pipe: PixArtPipeline, latents: Tensor, resolved: ResolvedRequest, output_type: str) -> Any:
    request, maker = resolved.request, _maker(pipe, resolved.sampling)
    image = _decoded(pipe, latents, output_type)
    finished = finish([image], request.height, request.width, output_type, maker)
    return finished[0] if output_type == "pil" else finished


def _maker(pipe: PixArtPipeline, sampling: SamplingConfig) -> str:
    """Who makes an image, for an error."""
    return f"{pipe.manifest.model['name']}, {sampling.scheduler}"
