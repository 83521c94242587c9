"""What each component of a bundle consists of: its parts, their graphs, references and profiles.

Only a text encoder has more than one part. Modules are made when they are needed and dropped
after, so that a build's memory stays near one part in two precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pixart_rt.buckets import VAE_SCALE_FACTOR, buckets
from pixart_rt.checkpoints.bundle_module import CONTROLNET, DenoiserModule
from pixart_rt.config import EngineConfig, ModelConfig, Quality, Weights, text_lengths
from pixart_rt.errors import BuildError
from pixart_rt.export.checkpoint_source import Source
from pixart_rt.export.onnx_export import (
    Graph,
    text_encoder_graph,
    text_encoder_inputs,
    transformer_graph,
    transformer_inputs,
    vae_decoder_graph,
)
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_encoder import T5Config
from pixart_rt.model.vae import VaeDecoder

SEED = 20231  # of the random inputs of the gate

Profile = dict[str, list[int]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of a component. `make` gives it in any precision; `config` describes its module."""

    name: str
    make: Callable[[torch.dtype], Graph]
    config: object


@dataclass(frozen=True, slots=True)
class Plan:
    """A component: its parts in running order, its engine profiles and the gate's inputs."""

    component: str
    precision: str
    parts: list[Part]
    profiles: list[Profile]
    cases: list[dict[str, Tensor]]  # small shapes, for the gate of what accepts any
    profile_cases: list[dict[str, Tensor]]  # a shape inside each profile; the first for `verify`
    predicted_peak: int | None = None  # bytes to build its largest engine, where predicted
    empty_prompt: dict[str, Tensor] | None = None  # a text encoder's, whose output is kept
    fp8: bool = False  # the transformer's linears, quantized when it is loaded
    weights: Weights = Weights.FULL  # and these, of whichever component
    memory_cases: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Inputs by their size (memory/activations.py), at which the build measures memory: few and
    small, because a forecast reads what is between and beyond off the line through them.
    """

    @property
    def label(self) -> str:
        """The precision of its arithmetic: what the numerics gate and the manifest call it."""
        if self.weights is not Weights.FULL:
            return f"{self.weights}-weights"
        return "fp8" if self.fp8 else self.precision


def inputs_of_part(inputs: Tensors, previous: Tensor | None) -> Tensors:
    """The inputs of a part: the component's own, or the previous part's output and the mask."""
    if previous is None:
        return inputs
    return {"hidden": previous, "attention_mask": inputs["attention_mask"]}


def plan_component(component: str, source: Source, config: EngineConfig, memory: int) -> Plan:
    """The plan of a component; `memory` in bytes bounds the parts of a text encoder."""
    planners = {
        "transformer": _plan_transformer,
        "vae_decoder": _plan_vae,
        "text_encoder": _plan_text_encoder,
    }
    return planners[component](source, config, memory)


def _plan_transformer(source: Source, config: EngineConfig, memory: int) -> Plan:
    model = source.config
    low, high = config.token_range
    images = config.max_batch
    channels = model.patch_size**2
    generator = torch.Generator().manual_seed(SEED)
    control = source.controlnet
    copies = None if control is None else control.num_copies

    def inputs(batch: int, num_tokens: int, guided: int | None = None) -> dict[str, Tensor]:
        return transformer_inputs(
            model,
            batch=batch,
            num_tokens=num_tokens,
            guided=guided,
            num_copies=copies,
            generator=generator,
        )

    def make(dtype: torch.dtype) -> Graph:
        return transformer_graph(DenoiserModule(source.transformer(dtype)), model, copies)

    profile = {
        "batch": [1, 1, images],
        "num_tokens": [low, high, high],
        "num_null": [0, 1, images],
        "num_text": [1, 1, 2 * images],
        "num_outputs": [
            channels * model.in_channels, channels * model.in_channels,
            channels * model.out_channels,
        ],
    }  # fmt: skip
    return Plan(
        "transformer",
        config.precision,
        [Part("model", make, _with_controlnet(model, control))],
        [profile],
        [inputs(2, 35), inputs(1, 64, guided=0), inputs(3, 17, guided=2)],
        [inputs(1, low), inputs(images, high, guided=0)],
        fp8=config.quality is Quality.FAST,
        weights=config.weights,
        # Every row attends to keys and values: the most that a block holds.
        memory_cases={2 * n: inputs(2, n, guided=0) for n in (low // 16, low // 4)},
    )


def _with_controlnet(model: ModelConfig, control: ControlNetConfig | None) -> object:
    """What a torch bundle keeps of the transformer's shape."""
    return model if control is None else {**asdict(model), CONTROLNET: control.to_dict()}


def _plan_vae(source: Source, config: EngineConfig, memory: int) -> Plan:
    values = source.vae_config()
    channels = values["latent_channels"]
    generator = torch.Generator().manual_seed(SEED)

    def latents(rows: int, height: int, width: int) -> dict[str, Tensor]:
        return {"latents": torch.randn(rows, channels, height, width, generator=generator)}

    def make(dtype: torch.dtype) -> Graph:
        return vae_decoder_graph(VaeDecoder(source.vae()).to(dtype).eval(), channels)

    profiles = vae_profiles(config)
    sizes = [(p["latent_height"][0], p["latent_width"][0]) for p in profiles]
    whole = config.resolution // VAE_SCALE_FACTOR
    config_values = {k: v for k, v in values.items() if not k.startswith("_")}
    return Plan(
        "vae_decoder",
        config.precision,
        [Part("model", make, config_values)],
        profiles,
        [latents(2, 8, 12), latents(1, 9, 5)],
        [latents(1, *size) for size in sizes],
        memory_cases={side**2: latents(1, side, side) for side in (whole // 4, whole // 2)},
    )


def vae_profiles(config: EngineConfig) -> list[Profile]:
    """Three boxes of latent sizes: wide, near square, tall.

    One box over all buckets would reach 256×256 latents and reserve four times the memory.
    """
    groups: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for bucket in buckets(config.resolution):
        group = 0 if bucket.ratio < 0.5 else 2 if bucket.ratio > 2.0 else 1
        groups[group].append((bucket.height // VAE_SCALE_FACTOR, bucket.width // VAE_SCALE_FACTOR))
    profiles = []
    for sizes in groups.values():
        heights, widths = zip(*sizes, strict=True)
        middle = sizes[len(sizes) // 2]
        profiles.append({
            "batch": [1, 1, config.max_batch],
            "latent_height": [min(heights), middle[0], max(heights)],
            "latent_width": [min(widths), middle[1], max(widths)],
        })  # fmt: skip
    return profiles


def _plan_text_encoder(source: Source, config: EngineConfig, memory: int) -> Plan:
    t5 = source.text_config()
    length = source.config.max_text_tokens
    shortest = text_lengths(length)[0]
    dtype = DTYPES[config.text_precision]
    whole = (config.text_encoder_backend or config.backend).startswith("torch")
    bounds = [(0, t5.num_layers)] if whole else split_layers(t5, dtype, memory)
    batch = 2 * config.max_batch
    generator = torch.Generator().manual_seed(SEED)

    def inputs(rows: int, num_tokens: int = length) -> dict[str, Tensor]:
        return text_encoder_inputs(
            t5.vocab_size, batch=rows, num_tokens=num_tokens, generator=generator
        )

    def part(index: int, start: int, stop: int) -> Part:
        def make(dtype: torch.dtype) -> Graph:
            return text_encoder_graph(source.text_encoder(dtype, start, stop), length)

        return Part("model" if len(bounds) == 1 else f"part{index}", make, t5)

    return Plan(
        "text_encoder",
        config.text_precision,
        [part(index, *bound) for index, bound in enumerate(bounds)],
        [{"batch": [1, 1, batch], "text_tokens": [shortest, length, length]}],
        [inputs(2), inputs(1, shortest), inputs(3, length // 2)],
        [inputs(1), inputs(2, shortest)],
        None if whole else max(predicted_peak(part_bytes(t5, dtype, *b)) for b in bounds),
        source.empty_prompt(),
        weights=config.text_weights,
        memory_cases={rows: inputs(rows) for rows in (1, 2)},
    )


# Memory of a text encoder's build. TensorRT-RTX 1.7 took 3.55 GB for XL/2's engine of 1.24 GB
# (benchmarks/results/build_xl.json), which is the only point; the factor leaves a fifth to spare.
PEAK_PER_WEIGHT_BYTE = 3.4
PEAK_BASE = 1 << 29


def predicted_peak(weight_bytes: int) -> int:
    """Predicted peak memory, in bytes, of building one engine of this many weight bytes."""
    return int(PEAK_BASE + PEAK_PER_WEIGHT_BYTE * weight_bytes)


def layer_bytes(t5: T5Config, dtype: torch.dtype) -> tuple[int, int]:
    """Weight bytes of the embedding and of one layer."""
    size = dtype.itemsize
    inner = t5.num_heads * t5.d_kv
    wo_size = 4 if dtype == torch.float16 else size
    layer = size * (4 * t5.d_model * inner + 2 * t5.d_model * t5.d_ff)
    return size * t5.vocab_size * t5.d_model, layer + wo_size * t5.d_model * t5.d_ff


def part_bytes(t5: T5Config, dtype: torch.dtype, start: int, stop: int) -> int:
    """Weight bytes of layers start to stop, with the embedding where they include the first."""
    embedding, layer = layer_bytes(t5, dtype)
    return (stop - start) * layer + (start == 0) * embedding


def split_layers(t5: T5Config, dtype: torch.dtype, memory: int) -> list[tuple[int, int]]:
    """Groups of layers, as even as can be, whose predicted peak fits `memory` bytes each.

    Raises BuildError when not even the embedding and one layer fit.
    """
    for groups in range(1, t5.num_layers + 1):
        edges = [round(index * t5.num_layers / groups) for index in range(groups + 1)]
        bounds = list(pairwise(edges))
        largest = max(part_bytes(t5, dtype, *bound) for bound in bounds)
        if predicted_peak(largest) <= memory:
            return bounds
    need = predicted_peak(part_bytes(t5, dtype, 0, 1))
    raise BuildError(
        f"the text encoder's first layer needs a predicted {need / 2**30:.1f} GiB to build, "
        f"{memory / 2**30:.1f} GiB may be used; use --text-encoder torch"
    )
