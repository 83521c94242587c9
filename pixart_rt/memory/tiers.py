"""Ways to make a pipeline smaller, best first, and the first of them that fits a card.

First what changes no image and costs the least time: the text encoder's weights are brought to the
GPU for each new prompt. Then the VAE in tiles, whose images are nearly the same, then int8 weights
of the text encoder, the largest component. A text encoder on the CPU changes nothing and is so slow
that it comes last but one. The transformer makes the image, so its weights are the last to be
quantized. int8 is always preferred to fp8, which takes as many bytes and is coarser; it can still
be asked for by name. Of a bundle, weights and precision are what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation, Overflow
from pathlib import Path
from typing import Any

from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig, Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.memory.forecast import Forecast, forecast
from pixart_rt.memory.models import PYTORCH, Model, bundle_model, find_model

GIB = 1 << 30
# What a prediction leaves free: the CUDA context and its modules, the workspaces of cuBLAS and
# cuDNN, and gaps between blocks. An assumption, not yet measured on a GPU.
RESERVE = 3 * GIB // 4
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
MOST_BYTES = 2**60
MOVED = "a new prompt waits for the text encoder's weights"
HOST = "a new prompt waits for the CPU"
INT8_TEXT = "int8 weights of the text encoder"
INT8_MODEL = "int8 weights of the transformer"
TILED = "the VAE decodes in tiles"
Step = tuple[str, tuple[str, ...], dict[str, Any]]  # name, what it gives up, changed settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A configuration by name, and what it takes."""

    name: str
    gives_up: str  # against `full`
    config: EngineConfig
    forecast: Forecast

    def fits(self, limit: int) -> bool:
        """True if its peak and the reserve fit `limit` bytes."""
        return self.forecast.peak + RESERVE <= limit


def ways(model: Model, config: EngineConfig) -> list[tuple[str, str, EngineConfig]]:
    """Every tier's name, what it gives up and its configuration, best first. `config` is what is
    used where memory is no concern.

    Each step down is tried without tiles, then with them. Only quality high has quantized weights
    (config.py says why).
    """
    text_backend, quantizes = model.backend("text_encoder"), model.bundle is None
    move: dict[str, Any] = {"text_place": TextPlace.OFFLOAD, "text_encoder_backend": "torch"}
    int8: dict[str, Any] = {"text_weights": Weights.INT8}
    steps: list[list[Step]] = [[("", (), {})]]
    if text_backend == "torch":
        steps[0].append(("text-offload", (MOVED,), move))
    if text_backend and quantizes:
        steps.append([("text-int8", (INT8_TEXT,), int8),
                      ("text-int8-offload", (INT8_TEXT, MOVED), int8 | move)])  # fmt: skip
    if text_backend in PYTORCH:
        steps.append([("text-cpu", (HOST,), {"text_place": TextPlace.CPU})])
    if quantizes and config.quality is Quality.HIGH:
        name, given, changes = steps[-1][0]
        changes = changes | {"weights": Weights.INT8}
        steps.append([(f"int8-{name}".rstrip("-"), (*given, INT8_MODEL), changes)])
    found = []
    for step in steps:
        for tiled in (False,) if config.vae_tiling else (False, True):
            for name, given, changes in step:
                label = f"{name}-tiled".lstrip("-") if tiled else name or "full"
                gives_up = "; ".join((*given, TILED) if tiled else given) or "nothing"
                changes = changes | {"vae_tiling": tiled or config.vae_tiling}
                found.append((label, gives_up, replace(config, **changes)))
    return found


def tiers(
    model: Model,
    config: EngineConfig,
    *,
    batches: Sequence[int] = (),
    cached_prompts: int | None = None,
) -> list[Tier]:
    """The tiers with their forecasts, best first; each with every one of `batches` images at once.
    One that takes no less than a better one gives something up for nothing and is left out.
    """
    found: list[Tier] = []
    for name, gives_up, way in ways(model, config):
        for batch in batches or (config.max_batch,):
            changed = replace(way, max_batch=batch)
            predicted = forecast(model, changed, cached_prompts=cached_prompts)
            if all(predicted.peak < better.forecast.peak for better in found):
                tier = Tier(name=name, gives_up=gives_up, config=changed, forecast=predicted)
                found.append(tier)
    return found


def choose(found: list[Tier], limit: int) -> Tier:
    """The best that fits `limit` bytes; CapacityError with the smallest need where none does."""
    for tier in found:
        if tier.fits(limit):
            return tier
    least = min(found, key=lambda tier: tier.forecast.peak)
    need = -(-(least.forecast.peak + RESERVE) * 10 // GIB) / 10  # upwards, to a tenth
    raise CapacityError(
        f"--vram {_amount(limit)} was requested, and nothing fits: the smallest is {least.name} "
        f"with a predicted peak of {least.forecast.peak / GIB:.2f} GiB and {RESERVE / GIB:.2f} GiB "
        f"for CUDA itself; give --vram {need:g}G, or ask for a smaller --batch or resolution"
    )


def _amount(size: int) -> str:
    """Bytes as `parse_bytes` reads them, in the largest unit that leaves a number of 1 or more."""
    unit, shift = max(
        ((unit, shift) for unit, shift in UNITS.items() if size >= 2**shift),
        key=lambda each: each[1], default=("", 0),
    )  # fmt: skip
    return f"{size / 2**shift:g}{unit}"


def fit_engine(model: str, config: EngineConfig, limit: int) -> Tier:
    """The best tier of a build whose predicted peak fits `limit` bytes.

    Raises ConfigError for components that are not PyTorch's or a model of unknown sizes,
    CapacityError where nothing fits.
    """
    for backend in (config.backend, config.text_encoder_backend or config.backend):
        if backend not in PYTORCH:
            raise ConfigError(
                f"--vram is not supported with backend {backend}, whose compiler decides what its "
                "engines take; tiers are for --backend torch or torch-compile"
            )
    found = find_model(model, config.resolution)
    configs = {name: values for name, values in found.configs.items() if name in config.components}
    return choose(tiers(replace(found, configs=configs), config), limit)


def fit_bundle(
    folder: Path, manifest: Manifest, limit: int, *, prompts: int = 2, vae_tiling: bool = False
) -> Tier:
    """The first way of running a bundle that fits `limit` bytes.

    In this order: as it was built; fewer images at once, down to one; the text encoder offloaded;
    both again with the VAE in tiles; the text encoder on the CPU, without tiles and with them.
    `prompts`: different ones that will be asked; `vae_tiling`: tiles in any case.
    Raises CapacityError where nothing fits.
    """
    model = bundle_model(folder, manifest)
    assert model.built is not None
    most, tiled = model.built.max_batch, vae_tiling or model.built.vae_tiling
    batches = sorted({most, *(1 << k for k in range(most.bit_length()))}, reverse=True)
    config = replace(model.built, vae_tiling=tiled)
    found = tiers(model, config, batches=batches, cached_prompts=prompts)
    for index, tier in enumerate(found):
        tiles = ", the VAE in tiles" if tier.config.vae_tiling else ""
        name = (f"this bundle with text encoder {tier.config.text_place}{tiles} and "
                f"{tier.config.max_batch} at once")  # fmt: skip
        found[index] = replace(tier, name=name)
    return choose(found, limit)


def parse_bytes(text: str) -> int:
    """Bytes of "8G", "7.5GiB", "8192M" or a plain number, in powers of 1024."""
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = digits[-1:] if digits[-1:].isalpha() else ""
    try:
        count = Decimal(digits.removesuffix(unit)) * 2 ** (UNITS[unit] if unit else 0)
        if count.is_finite() and 1 <= count <= MOST_BYTES:
            return int(count)
    except (InvalidOperation, Overflow, KeyError):
        pass
    raise ConfigError(f"--vram {text!r} is no amount of memory; write it as 8G or 8192M")
