"""Peak memory of a whole request: which weights are on the device when, and what runs beside them.

A pipeline loads all components first, then goes through four stages for each request:

    encode    text encoder on every new prompt
    prepare   text side on every new prompt; its absorbed form; the plan
    denoise   transformer, num_inference_steps times
    decode    VAE, once a batch

In all of them the resident weights are on the device, and the caches. A stage adds the activations
of the one component that runs; nothing of the previous stage but its results is still held, so
PyTorch's caching allocator gives a later stage the same memory: it is the arena that the components
share, and the peak is the largest stage, not their sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pixart_rt.buckets import VAE_SCALE_FACTOR, buckets, token_range
from pixart_rt.config import ModelConfig, Precision, Quality, TextPlace, Weights, text_lengths
from pixart_rt.inference.prompts import CACHED_PROMPTS, CACHED_TEXT_BYTES
from pixart_rt.inference.request_plan import PLAN_BYTES
from pixart_rt.inference.vae_tiling import Tiling, tile_size
from pixart_rt.memory.activations import (
    WIDE,
    text_activations,
    transformer_activations,
    vae_activations,
)
from pixart_rt.memory.shapes import ModelShape
from pixart_rt.memory.text_side import TextMemory, Words, any_words, kv_bytes
from pixart_rt.memory.weights import (
    text_side_weights,
    text_weights,
    transformer_weights,
    vae_weights,
)

LATENT_COPIES = 6  # noise, latents and x0 before and after a step, both halves' prediction
STAGES = ("encode", "prepare", "denoise", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What can be chosen to make a pipeline smaller, and where it runs."""

    precision: Precision = Precision.BF16  # of transformer and VAE
    text_precision: Precision = Precision.BF16
    weights: Weights = Weights.FULL  # of the transformer
    text_weights: Weights = Weights.FULL
    text_place: TextPlace = TextPlace.RESIDENT
    tiling: Tiling | None = None  # of the VAE
    quality: Quality = Quality.HIGH
    batch: int = 1  # images at once; guidance doubles the transformer's rows
    fused: bool = True  # the transformer's kernels: on a GPU they are
    conv_copies: int = 0  # as in vae_activations
    cached_prompts: int | None = None  # and one plan; None: caches as full as they get
    words: Words | None = None  # None: whatever prompts there are


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
    null_prompt: int  # embeddings of the empty prompt, loaded with the weights
    caches: int  # of prompts, their keys and values, and plans
    stages: dict[str, int] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """What is there before the first request."""
        return sum(part.weights for part in self.parts.values()) + self.null_prompt

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name])


def forecast(shape: ModelShape, resolution: int, setting: Setting, steps: int = 20) -> Forecast:
    """The prediction for requests at `resolution`, whatever their aspect ratio.

    Beside weights and activations, of float32 and B images, T text tokens of C channels:
        caches         embeddings T·C·4 and keys and values of each prompt; a plan, positions and
                       modulation B·(N + 7·steps)·D·4; full: 256 prompts, 40 shapes, bounded
        prepare        the request's embeddings, conditional and not 2·B·T·C·4, and once more of one
                       of them; what `TextMemory` says; noise
        denoise        embeddings 2·B·T·C·4; the rows' text; 6 tensors of a latent's size
        decode         the same embeddings, the absorbed form of the last prompts, latents, and the
                       image twice; in tiles, all images and the previous tile's
    """
    words = any_words(shape.config) if setting.words is None else (setting.words,)
    texts = [_text(shape, setting, each) for each in words]
    parts = _parts(shape, resolution, setting, texts)
    config, B = shape.config, setting.batch
    embeds = config.max_text_tokens * (config.caption_channels * WIDE + 1)
    _, tokens = token_range(resolution)
    caches = _caches(shape, resolution, setting, embeds, B * (tokens + steps * 7))
    found = Forecast(parts=parts, null_prompt=embeds if shape.text else 0, caches=caches)
    resident = found.loaded + caches
    latents = B * config.in_channels * tokens * config.patch_size**2 * WIDE
    image = B * 3 * tokens * (VAE_SCALE_FACTOR * config.patch_size) ** 2 * WIDE
    if "text_encoder" in parts:
        text = parts["text_encoder"]
        found.stages["encode"] = resident + text.brought + text.activations
    request = resident + 2 * B * embeds
    found.stages["prepare"] = request + parts["text_side"].activations + B * embeds + 2 * latents
    found.stages["denoise"] = request + LATENT_COPIES * latents + max(
        _step(shape.config, tokens, setting, text) + text.denoise for text in texts
    )  # fmt: skip
    running = parts["vae_decoder"].activations
    if setting.tiling is not None:
        running += image + 3 * _decoded_pixels(resolution, setting) * WIDE
    decoding = max(running, 3 * image)  # at the end, joined and finished
    kept = max(text.kept for text in texts)
    found.stages["decode"] = request + decoding + kept + latents
    return found


def _text(shape: ModelShape, setting: Setting, words: Words) -> TextMemory:
    return TextMemory(
        config=shape.config,
        precision=_side_precision(setting),
        batch=setting.batch,
        words=words,
        absorbs=setting.quality is not Quality.LOSSLESS,
        named=shape.text is not None,
        replaces=setting.cached_prompts is None,
    )


def _side_precision(setting: Setting) -> Precision:
    """The text side's: float16 is float32 on a CPU."""
    wide = not setting.fused and setting.precision is Precision.FP16
    return Precision.FP32 if wide else setting.precision


def _caches(
    shape: ModelShape, resolution: int, setting: Setting, embeds: int, plan_rows: int
) -> int:
    """Bytes of prompts, their text, and plans. Embeddings that a caller brings are not kept."""
    kv = kv_bytes(shape.config, _side_precision(setting))
    plan = plan_rows * shape.config.hidden_size * WIDE
    prompts = setting.cached_prompts
    if prompts is None:
        plans = max(plan, min(len(buckets(resolution)) * plan, PLAN_BYTES))
        prompts = CACHED_PROMPTS
    else:
        plans = plan
    empty = setting.words is None or setting.words.negative == 1  # its embeddings are loaded
    text = max(kv, min((prompts + empty) * kv, CACHED_TEXT_BYTES))
    return plans + (prompts * embeds + text if shape.text else 0)


def _step(config: ModelConfig, tokens: int, setting: Setting, text: TextMemory) -> int:
    """Activations of one step with this text."""
    constant, length = text.rows
    return transformer_activations(
        config,
        setting.precision,
        rows=2 * setting.batch,
        num_tokens=tokens,
        constant=constant,
        length=length,
        fused=setting.fused,
        quality=setting.quality,
        weights=setting.weights,
    )


def _parts(
    shape: ModelShape, resolution: int, setting: Setting, texts: list[TextMemory]
) -> dict[str, Part]:
    config, B = shape.config, setting.batch
    parts = {}
    if shape.text is not None:
        parts["text_encoder"] = _text_part(shape, config, setting)
    side = _side_precision(setting)
    parts["text_side"] = Part(
        dtype=side,
        weights=text_side_weights(config, side),
        activations=max(text.prepare for text in texts),
    )
    tokens = token_range(resolution)[1]
    parts["transformer"] = Part(
        dtype=_dtype(setting.precision, setting.weights, setting.quality),
        weights=transformer_weights(config, setting.precision, setting.weights, setting.quality),
        activations=max(_step(config, tokens, setting, text) for text in texts),
    )
    height, width = _decoded(resolution, setting)
    parts["vae_decoder"] = Part(
        dtype=setting.precision,
        weights=vae_weights(shape.vae, setting.precision),
        activations=vae_activations(
            shape.vae,
            setting.precision,
            rows=B if setting.tiling is None else 1,
            height=height,
            width=width,
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
    longest = config.max_text_tokens
    if setting.words is not None:
        most = max(setting.words.prompt, setting.words.negative)
        longest = min(length for length in text_lengths(longest) if length >= most)
    activations = text_activations(
        shape.text,
        setting.text_precision,
        rows=2 * setting.batch,  # prompts that a pipeline encodes at once, at most
        num_tokens=longest,
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


def _decoded(resolution: int, setting: Setting) -> tuple[int, int]:
    """The most latents, height and width, that the VAE decodes of an image at once."""
    sizes = [(each.height // VAE_SCALE_FACTOR, each.width // VAE_SCALE_FACTOR)
             for each in buckets(resolution)]  # fmt: skip
    if setting.tiling is not None:
        sizes = [tile_size(height, width, setting.tiling) for height, width in sizes]
    return max(sizes, key=math.prod)


def _decoded_pixels(resolution: int, setting: Setting) -> int:
    return math.prod(_decoded(resolution, setting)) * VAE_SCALE_FACTOR**2
