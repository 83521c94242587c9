"""The ways to fit a pipeline into less memory, best first, and the first that fits.

Best means: what changes the image least; among equals, the faster. Decoding in tiles comes before
anything is rounded more coarsely: GroupNorm and attention of the VAE see less, but the prompt is
read, and the image denoised, as before. A text encoder on the CPU changes nothing and is so slow
that it comes last but one. The transformer makes the image, so its weights are the last to be
quantized. int8 is always preferred to fp8, which takes as many bytes and is coarser; it can still
be asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

from pixart_rt.config import Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.inference.vae_tiling import Tiling
from pixart_rt.memory.forecast import Forecast, Setting, forecast
from pixart_rt.memory.shapes import ModelShape

GIB = 1 << 30
# What a prediction leaves free: the CUDA context and its modules, the workspaces of cuBLAS and
# cuDNN, and gaps between blocks. An assumption, not yet measured on a GPU.
RESERVE = 3 * GIB // 4
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A setting by name."""

    name: str
    gives_up: str  # against `full`
    setting: Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A tier with its forecast, and whether it fits."""

    tier: Tier
    forecast: Forecast
    fits: bool | None  # None where no limit was given


_MOVED = "a new prompt waits for the text encoder's weights"
_HOST = "a new prompt waits for the CPU"
_TEXT = "int8 weights of the text encoder"
_TILED = "the VAE decodes in tiles"


def tiers(base: Setting, has_text: bool) -> list[Tier]:
    """Every tier, best first. `base` is what is used where memory is no concern.

    Each step down is tried without tiles, then with them. Only quality high has quantized weights
    (config.py says why).
    """
    full = Tier(name="full", gives_up="nothing", setting=base)
    steps = [[full]]
    if has_text:
        move, host = TextPlace.OFFLOAD, TextPlace.CPU
        int8 = replace(base, text_weights=Weights.INT8)
        steps[0].append(_tier("text-offload", _MOVED, base, text_place=move))
        steps.append(
            [
                _tier("text-int8", _TEXT, int8),
                _tier("text-int8-offload", f"{_TEXT}; {_MOVED}", int8, text_place=move),
            ]
        )
        steps.append([_tier("text-cpu", _HOST, base, text_place=host)])
    if base.quality is Quality.HIGH:
        last = steps[-1][0] if has_text else None
        before = f"{last.gives_up}; " if last else ""
        steps.append(
            [
                _tier(
                    f"int8-{last.name}" if last else "int8",
                    f"{before}int8 weights of the transformer",
                    last.setting if last else base,
                    weights=Weights.INT8,
                )
            ]
        )
    if base.tiling is not None:
        return [tier for step in steps for tier in step]
    return [tier for step in steps for tier in (*step, *(_tiled(each) for each in step))]


def _tier(name: str, gives_up: str, setting: Setting, **changes: object) -> Tier:
    return Tier(name=name, gives_up=gives_up, setting=replace(setting, **changes))  # type: ignore[arg-type]


def _tiled(tier: Tier) -> Tier:
    if tier.name == "full":
        return _tier("tiled", _TILED, tier.setting, tiling=Tiling())
    return _tier(f"{tier.name}-tiled", f"{tier.gives_up}; {_TILED}", tier.setting, tiling=Tiling())


def choices(
    shape: ModelShape, resolution: int, base: Setting, limit: int | None = None
) -> list[Choice]:
    """The tiers with their forecasts, best first. `limit` is the card's memory in bytes.

    A tier that takes no less than a better one gives something up for nothing and is left out.
    """
    found: list[Choice] = []
    for tier in tiers(base, shape.text is not None):
        predicted = forecast(shape, resolution, tier.setting)
        if any(predicted.peak >= better.forecast.peak for better in found):
            continue
        fits = None if limit is None else predicted.peak + RESERVE <= limit
        found.append(Choice(tier=tier, forecast=predicted, fits=fits))
    return found


def choose(found: list[Choice], limit: int) -> Choice:
    """The best that fits `limit` bytes; CapacityError with the smallest need where none does."""
    for choice in found:
        if choice.fits:
            return choice
    least = found[-1]
    raise CapacityError(too_small(limit, least.forecast.peak, least.tier.name))


def too_small(limit: int, peak: int, name: str) -> str:
    """The one line where nothing fits."""
    need = -(-(peak + RESERVE) * 10 // GIB) / 10  # upwards, to a tenth
    return (
        f"--vram {limit / GIB:g}G was asked, and nothing fits: the smallest is {name} with a "
        f"predicted peak of {peak / GIB:.2f} GiB and {RESERVE / GIB:.2f} GiB for CUDA itself; give "
        f"--vram {need:g}G, or ask for a smaller --batch or resolution"
    )


def parse_bytes(text: str) -> int:
    """Bytes of "8G", "7.5GiB", "8192M" or a plain number, in powers of 1024."""
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = digits[-1:] if digits[-1:].isalpha() else ""
    try:
        count = Decimal(digits.removesuffix(unit)) * 2 ** (UNITS[unit] if unit else 0)
    except (InvalidOperation, KeyError) as error:
        raise ConfigError(
            f"--vram {text!r} is no amount of memory; write it as 8G or 8192M"
        ) from error
    if not count.is_finite() or count < 1:
        raise ConfigError(f"--vram {text!r} is no amount of memory; write it as 8G or 8192M")
    return int(count)
