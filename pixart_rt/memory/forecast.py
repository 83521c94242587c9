"""Peak memory of a whole request: which weights are on the device when, and what runs beside them.

A pipeline loads all components first, then goes through three stages for each request:

    encode    text encoder on every new prompt
    denoise   transformer, num_inference_steps times
    decode    VAE, once a batch

In all of them the resident weights are on the device, and the prompt cache. A stage adds the
activations of the one component that runs; nothing of the previous stage but its results is still
held, so PyTorch's caching allocator gives a later stage the same memory: it is the arena that the
components share, and the peak is the largest stage, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pixart_rt.buckets import Bucket, buckets, token_range
from pixart_rt.config import ModelConfig, Precision, Quality, TextPlace, Weights
from pixart_rt.memory.activations import (
    WIDE,
    text_activations,
    transformer_activations,
    vae_activations,
)
from pixart_rt.memory.shapes import ModelShape
from pixart_rt.memory.weights import text_weights, transformer_weights, vae_weights

CACHED_PROMPTS = 256  # that prompts.py keeps; a pipeline that has run long holds them all
LATENT_SHRINK = 8  # pixels per latent pixel
LATENT_COPIES = 10  # noise, scaled latents, both halves' prediction and its parts, solver history
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What can be chosen to make a pipeline smaller, and where it runs."""

    precision: Precision = Precision.BF16  # of transformer and VAE
    text_precision: Precision = Precision.BF16
    weights: Weights = Weights.FULL  # of the transformer
    text_weights: Weights = Weights.FULL
    text_place: TextPlace = TextPlace.RESIDENT
    quality: Quality = Quality.HIGH
    batch: int = 1  # images at once; guidance doubles the transformer's rows
    fused: bool = True  # the transformer's kernels: on a GPU they are
    conv_copies: int = 0  # as in vae_activations: 1 on a CPU
    cached_prompts: int = CACHED_PROMPTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A component's bytes on the device: weights there throughout, and what a call adds."""

    dtype: str
    weights: int  # resident on the device
    brought: int = 0  # weights that are there only while it runs
    activations: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Predicted bytes on the device."""

    parts: dict[str, Part]
    prompt_cache: int
    stages: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name])


def forecast(shape: ModelShape, resolution: int, setting: Setting, steps: int = 20) -> Forecast:
    """The prediction for requests at `resolution`, whatever their aspect ratio.

    Beside weights and activations, of float32 and B images, T text tokens of C channels:
        prompt cache   cached prompts · T·C·4, and a boolean mask
        encode         nothing else
        denoise        the request's embeddings, twice (conditional and not) and once more joined:
                       4·B·T·C·4; the position table N·D·4; modulation steps·7·D·4; latents,
                       predictions and the solver's history: 10 tensors of a latent's size
        decode         the request's embeddings 2·B·T·C·4, latents, and the image twice
    """
    parts = _parts(shape, resolution, setting)
    config, B = shape.config, setting.batch
    embeds = config.max_text_tokens * config.caption_channels * WIDE
    cache = setting.cached_prompts * (embeds + config.max_text_tokens)
    resident = sum(part.weights for part in parts.values()) + cache
    _, tokens = token_range(resolution)
    latents = B * config.in_channels * tokens * config.patch_size**2 * WIDE
    tables = (tokens + steps * 7) * config.hidden_size * WIDE
    image = B * 3 * tokens * (LATENT_SHRINK * config.patch_size) ** 2 * WIDE
    stages = {}
    if "text_encoder" in parts:
        text = parts["text_encoder"]
        stages["encode"] = resident + text.brought + text.activations
    stages["denoise"] = (
        resident + parts["transformer"].activations
        + 4 * B * embeds + tables + LATENT_COPIES * latents
    )  # fmt: skip
    decoding = max(parts["vae_decoder"].activations, 3 * image)  # at the end, joined and finished
    stages["decode"] = resident + decoding + 2 * B * embeds + latents
    return Forecast(parts=parts, prompt_cache=cache, stages=stages)


def _parts(shape: ModelShape, resolution: int, setting: Setting) -> dict[str, Part]:
    config, B = shape.config, setting.batch
    parts = {}
    if shape.text is not None:
        parts["text_encoder"] = _text_part(shape, config, setting)
    parts["transformer"] = Part(
        dtype=_dtype(setting.precision, setting.weights, setting.quality),
        weights=transformer_weights(config, setting.precision, setting.weights, setting.quality),
        activations=transformer_activations(
            config,
            setting.precision,
            rows=2 * B,
            num_tokens=token_range(resolution)[1],
            fused=setting.fused,
            quality=setting.quality,
            weights=setting.weights,
        ),
    )
    largest = max(buckets(resolution), key=_pixels)
    parts["vae_decoder"] = Part(
        dtype=setting.precision,
        weights=vae_weights(shape.vae, setting.precision),
        activations=vae_activations(
            shape.vae,
            setting.precision,
            rows=B,
            height=largest.height // LATENT_SHRINK,
            width=largest.width // LATENT_SHRINK,
            conv_copies=setting.conv_copies,
        ),
    )
    return parts


def _text_part(shape: ModelShape, config: ModelConfig, setting: Setting) -> Part:
    assert shape.text is not None
    weights = text_weights(shape.text, setting.text_precision, setting.text_weights)
    dtype = _dtype(setting.text_precision, setting.text_weights)
    if setting.text_place is TextPlace.CPU:
        return Part(dtype=f"{dtype} on the CPU", weights=0)
    activations = text_activations(
        shape.text,
        setting.text_precision,
        rows=2 * setting.batch,  # prompts that a pipeline encodes at once, at most
        num_tokens=config.max_text_tokens,
        weights=setting.text_weights,
    )
    if setting.text_place is TextPlace.OFFLOAD:
        return Part(dtype=f"{dtype} offloaded", weights=0, brought=weights, activations=activations)
    return Part(dtype=dtype, weights=weights, activations=activations)


def _dtype(
    precision: Precision, weights: Weights = Weights.FULL, quality: Quality = Quality.HIGH
) -> str:
    if weights is not Weights.FULL:
        return f"{precision}, {weights} weights"
    return f"{precision} and fp8 weights" if quality is Quality.FAST else str(precision)


def _pixels(bucket: Bucket) -> int:
    return bucket.height * bucket.width
