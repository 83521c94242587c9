"""The ways to fit a pipeline into less memory, best first, and the first that fits.

Best means: nothing rounded more coarsely before anything is; among equals, the faster. The
transformer makes the image, so its weights are the last to be quantized. int8 is always preferred
to fp8, which takes as many bytes and is coarser; it can still be asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

from pixart_rt.config import Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
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
    gives_up: str  # what it costs against the tier before it
    setting: Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A tier with its forecast, and whether it fits."""

    tier: Tier
    forecast: Forecast
    fits: bool | None  # None where no limit was given


def tiers(base: Setting, has_text: bool) -> list[Tier]:
    """Every tier, best first. `base` is what is used where memory is no concern.

    Only quality high has quantized weights (config.py says why).
    """
    found = [Tier(name="full", gives_up="nothing", setting=base)]
    move, host = TextPlace.OFFLOAD, TextPlace.CPU
    int8 = {"text_weights": Weights.INT8}
    if has_text:
        found += [
            _tier("text-offload", base, _MOVED, text_place=move),
            _tier("text-int8", base, "int8 weights of the text encoder", **int8),
            _tier("text-int8-offload", base, f"the same, and {_MOVED}", text_place=move, **int8),
            _tier("text-cpu", base, "a new prompt waits for the CPU", text_place=host),
        ]
    if base.quality is Quality.HIGH:
        place = {"text_place": host} if has_text else {}
        before = "the same, and " if has_text else ""
        name = "int8-text-cpu" if has_text else "int8"
        found.append(_tier(name, base, f"{before}{_INT8}", weights=Weights.INT8, **place))
    return found


_MOVED = "a new prompt waits for the text encoder's weights"
_INT8 = "int8 weights of the transformer"


def _tier(name: str, base: Setting, gives_up: str, **changes: object) -> Tier:
    return Tier(name=name, gives_up=gives_up, setting=replace(base, **changes))  # type: ignore[arg-type]


def choices(
    shape: ModelShape, resolution: int, base: Setting, limit: int | None = None
) -> list[Choice]:
    """Every tier with its forecast, best first. `limit` is the card's memory in bytes."""
    found = []
    for tier in tiers(base, shape.text is not None):
        predicted = forecast(shape, resolution, tier.setting)
        fits = None if limit is None else predicted.peak + RESERVE <= limit
        found.append(Choice(tier=tier, forecast=predicted, fits=fits))
    return found


def choose(found: list[Choice], limit: int) -> Choice:
    """The best that fits `limit` bytes; CapacityError with the smallest need where none does."""
    for choice in found:
        if choice.fits:
            return choice
    least = min(found, key=lambda choice: choice.forecast.peak)
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
