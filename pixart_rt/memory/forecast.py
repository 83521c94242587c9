"""Peak memory of a whole request: the weights on the device at each stage, and the call that runs.

A pipeline loads all components first, then goes through these stages for each request:

    encode    text encoder on every new prompt
    prepare   text side on every new prompt; its absorbed form; the plan
    control   with a ControlNet: the VAE's encoder on every control image, one at a time
    denoise   transformer, num_inference_steps times
    decode    VAE, once a batch; in tiles, once a tile

In all of them the resident weights are on the device, and the caches. A stage adds the activations
of the one component that runs: PyTorch's caching allocator gives a later stage the same memory, so
the peak is the largest stage, not their sum. Engines reserve theirs when they are loaded: ONNX
Runtime for each session, TensorRT one block for all of its engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pixart_rt.buckets import PIXELS_PER_TOKEN, VAE_SCALE_FACTOR, buckets
from pixart_rt.bundle import ComponentEntry
from pixart_rt.config import EngineConfig, Quality, TextPlace, Weights
from pixart_rt.inference.cache_limits import (
    CACHED_PROMPTS,
    CACHED_TEXT_BYTES,
    PLAN_BYTES,
    PROMPT_BYTES,
)
from pixart_rt.inference.tile_sizes import Tiling, tile_size
from pixart_rt.memory.activations import interpolate, upper_bound, vae_encoder_bound
from pixart_rt.memory.models import PYTORCH, Model, read_json
from pixart_rt.memory.weights import SIZE, engine_bytes, module_bytes, transformer_configs
from pixart_rt.model.controlnet_config import VAE_ENCODER

WIDE = 4  # bytes: float32
LATENT_COPIES = 6  # noise, latents and x0 before and after a step, both halves' prediction
ABSORBED = 64  # slots of the absorbed form of the longest prompts that have one: it is the largest


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentBytes:
    """A component's bytes on the device."""

    dtype: str
    weights: int  # resident
    brought: int = 0  # weights that are there only while it runs
    activations: int = 0
    library: str = "torch"

    @property
    def running(self) -> int:
        """Activations that a call allocates; an engine's are there already."""
        return self.activations if self.library in ("torch", "aoti") else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Predicted bytes on the device."""

    parts: dict[str, ComponentBytes]
    null_prompt: int  # embeddings of the empty prompt, loaded with the weights
    caches: int  # of prompts, their keys and values, and plans
    stages: dict[str, int] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """Bytes before the first request; a ControlNet's VAE encoder, which it loads, included."""
        reserved = {"onnxruntime": [0], "tensorrt": [0]}
        for part in self.parts.values():
            reserved.get(part.library, []).append(part.activations)
        engines = sum(reserved["onnxruntime"]) + max(reserved["tensorrt"])
        return sum(part.weights for part in self.parts.values()) + self.null_prompt + engines

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name])


def forecast(
    model: Model, config: EngineConfig, *, cached_prompts: int | None = None, steps: int = 20
) -> Forecast:
    """The prediction for guided requests of `config.max_batch` images, of any prompts and shape.

    cached_prompts: and one plan; None for caches as full as they get: 256 prompts, 40 shapes.
    B images, N tokens, T text tokens of C channels, D width, L blocks and copies, H heads, s bytes:
        a prompt    embeddings T·C·4; keys and values L·T·2·D·s; their absorbed form
                    L·H·64·(2·D·s + 4), twice while it is made and kept for the next request
        a plan      B·(N + 7·steps)·D·4
        prepare     the request's embeddings, both halves' keys and values twice, absorbed forms
        denoise     the rows' text; 6 tensors of a latent's size
        decode      absorbed forms, latents, and the image; in tiles, the images and three tiles
    """
    shape, B, s = model.config, config.max_batch, SIZE[config.precision]
    T, D, tokens = shape.max_text_tokens, shape.hidden_size, config.token_range[1]
    transformer = model.configs.get("transformer", shape.to_dict())
    control = transformer_configs(transformer)[1]
    layers = shape.num_layers + (0 if control is None else control.num_copies)
    embeds = T * (shape.caption_channels * WIDE + 1)
    kv = layers * T * 2 * D * s
    absorbs = model.backend("transformer") in PYTORCH and config.quality is not Quality.LOSSLESS
    absorbed = 2 * B * layers * shape.num_heads * ABSORBED * (2 * D * s + WIDE) * absorbs
    full = cached_prompts is None
    making = 4 * B * kv + (3 if full else 2) * absorbed  # full: the last request's is still there
    parts = {name: _component(model, name, config) for name in model.configs}
    side = module_bytes("text_side", transformer, config.precision)
    parts["text_side"] = ComponentBytes(dtype=config.precision, weights=side, activations=making)
    if control is not None and model.bundle is not None:
        parts |= _control_encoder(model, config)
    has_text = "text_encoder" in parts
    plan = B * (tokens + 7 * steps) * D * WIDE
    plans = max(plan, min(len(buckets(config.resolution)) * plan, PLAN_BYTES)) if full else plan
    prompts = CACHED_PROMPTS if cached_prompts is None else cached_prompts
    kept = max(embeds, min(prompts * embeds, PROMPT_BYTES))
    kept += max(kv, min((prompts + 1) * kv, CACHED_TEXT_BYTES))
    found = Forecast(parts=parts, null_prompt=embeds * has_text, caches=plans + kept * has_text)
    request = found.loaded + found.caches + 2 * B * embeds
    latents = B * shape.token_channels * tokens * WIDE
    image = B * 3 * tokens * PIXELS_PER_TOKEN**2 * WIDE
    if has_text:
        text = parts["text_encoder"]
        found.stages["encode"] = found.loaded + found.caches + text.brought + text.running
    found.stages["prepare"] = request + making + B * embeds + 2 * latents
    if VAE_ENCODER in parts:
        found.stages["control"] = request + latents + parts[VAE_ENCODER].running
    if "transformer" in parts:
        copies = LATENT_COPIES + (0 if control is None else 2)  # the control's, as image and tokens
        step = parts["transformer"].running + copies * latents + (absorbed or 2 * B * kv)
        found.stages["denoise"] = request + step
    if "vae_decoder" in parts:
        decoding = parts["vae_decoder"].running
        if config.vae_tiling:
            decoding += image + 3 * 3 * _decoded(config) * VAE_SCALE_FACTOR**2 * WIDE
        found.stages["decode"] = request + absorbed + latents + max(decoding, 3 * image)
    return found


def _component(model: Model, name: str, config: EngineConfig) -> ComponentBytes:
    is_text, entry, backend = name == "text_encoder", model.entry(name), model.backend(name)
    precision = config.text_precision if is_text else config.precision
    weights = {"text_encoder": config.text_weights, "transformer": config.weights}.get(
        name, Weights.FULL
    )
    size, values = _size(name, config, entry), model.configs[name]
    if entry is not None and entry.memory is not None:
        activations = interpolate(entry.memory.peaks, size)
    else:
        length = model.config.max_text_tokens
        activations = upper_bound(name, values, size, length, precision, weights)
    if backend in PYTORCH:
        stored = module_bytes(name, values, precision, weights, config.quality)
        dtype = precision if weights is Weights.FULL else f"{precision}, {weights} weights"
        if config.quality is Quality.FAST and name == "transformer":
            dtype += " and fp8 weights"
    else:
        assert model.bundle is not None and entry is not None
        stored, dtype = engine_bytes(model.bundle[0], entry), f"{precision} in {backend}"
    if is_text and config.text_place is TextPlace.CPU:
        return ComponentBytes(dtype=f"{dtype} on the CPU", weights=0)
    if is_text and config.text_place is TextPlace.OFFLOAD:
        dtype = f"{dtype} offloaded"
        return ComponentBytes(dtype=dtype, weights=0, brought=stored, activations=activations)
    library = backend.partition("-")[0]
    return ComponentBytes(dtype=dtype, weights=stored, activations=activations, library=library)


def _control_encoder(model: Model, config: EngineConfig) -> dict[str, ComponentBytes]:
    """The encoder of control images, if the bundle has it; without, requests bring latents."""
    assert model.bundle is not None
    folder = model.bundle[0] / VAE_ENCODER
    path, pixels = folder / "model.safetensors", config.token_range[1] * PIXELS_PER_TOKEN**2
    if not path.is_file():
        return {}
    with path.open("rb") as file:  # its header's length, the header, the tensors
        header = 8 + int.from_bytes(file.read(8), "little")
    return {
        VAE_ENCODER: ComponentBytes(
            dtype="fp32",
            weights=path.stat().st_size - header,
            activations=vae_encoder_bound(read_json(folder / "config.json"), pixels),
        )
    }


def _size(name: str, config: EngineConfig, entry: ComponentEntry | None) -> int:
    """The size of a component's largest call, in the units of activations.py. An engine with
    profiles reserves memory for the largest of these, for any request.
    """
    profiles = entry.profiles if entry is not None else []
    if profiles and name == "vae_decoder":
        return max(math.prod(p[axis][-1] for axis in ("batch", "latent_height", "latent_width"))
                   for p in profiles)  # fmt: skip
    if profiles:
        batch = profiles[0]["batch"][-1]
        return batch if name == "text_encoder" else 2 * batch * profiles[0]["num_tokens"][-1]
    if name == "text_encoder":
        return 2 * config.max_batch
    if name == "transformer":
        return 2 * config.max_batch * config.token_range[1]
    return _decoded(config) * (1 if config.vae_tiling else config.max_batch)


def _decoded(config: EngineConfig) -> int:
    """The most latent pixels of an image that the VAE decodes at once."""
    sizes = [(bucket.height // VAE_SCALE_FACTOR, bucket.width // VAE_SCALE_FACTOR)
             for bucket in buckets(config.resolution)]  # fmt: skip
    if config.vae_tiling:
        sizes = [tile_size(*size, Tiling()) for size in sizes]
    return max(math.prod(size) for size in sizes)
