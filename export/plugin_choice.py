"""Which of two engines of a component runs on this GPU: the plain one, or the one with plugins.

A plugin is faster than what the library makes of the same operators, or slower: it also keeps the
library from fusing across it. So both are run side by side where they will serve, on random inputs
at the shape they were tuned for, and the bundle's manifest keeps what was found, by the name of the
GPU. Nothing found there means the plain one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.backends.engine_files import capability
from pixart_rt.backends.trt.backend import LIBRARIES, TensorRTBackend
from pixart_rt.backends.trt.engine import Engine
from pixart_rt.bundle import MANIFEST, ComponentEntry, Manifest, Measurement
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export.numerics import difference
from pixart_rt.files import replacing

WARM_UP = 5  # untimed runs of each: first runs compile, allocate and raise the clocks
ROUNDS = 30  # timed runs of each, in turns, so that a drift of the clocks meets both
SEED = 20231

Clock = Callable[[Callable[[], Any]], float]  # milliseconds of one call


def cuda_milliseconds(call: Callable[[], Any]) -> float:
    """One call on the current stream, between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def compare(
    plain: Callable[[], Any], plugins: Callable[[], Any], clock: Clock
) -> tuple[float, float]:
    """The median milliseconds of two calls that are run in turns."""
    for _ in range(WARM_UP):
        plain()
        plugins()
    times = [(clock(plain), clock(plugins)) for _ in range(ROUNDS)]
    first, second = zip(*times, strict=True)
    return statistics.median(first), statistics.median(second)


def measure(
    plain: Callable[..., Tensor],
    plugins: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    precision: str,
    clock: Clock = cuda_milliseconds,
) -> Measurement:
    """Whether a component with plugins computes what it computes without, and how fast each is."""
    found = difference(plugins(**inputs).cpu(), plain(**inputs).cpu())
    times = compare(lambda: plain(**inputs), lambda: plugins(**inputs), clock)
    return Measurement(
        plain=round(times[0], 4),
        plugins=round(times[1], 4),
        right=found.within(precision),
        difference=str(found),
        shapes={name: list(tensor.shape) for name, tensor in inputs.items()},
        date=datetime.now(UTC).date().isoformat(),
    )


def random_inputs(engine: Engine, device: torch.device) -> dict[str, Tensor]:
    """Inputs of an engine at the shapes that its first profile was tuned for.

    Masks are random, but for the first token, which every row sees.
    """
    generator = torch.Generator().manual_seed(SEED)
    inputs = {}
    for name, (_, usual, _) in engine.profiles[0].items():
        value = torch.randn(usual, generator=generator)
        dtype = engine.dtypes[name]
        if dtype == torch.bool:
            value[..., 0] = 1
            inputs[name] = (value > 0).to(device)
        else:
            inputs[name] = value.to(dtype).to(device)
    return inputs


def choose(bundle: Path, manifest: Manifest, name: str) -> ComponentEntry:
    """Measure both variants of a component on this GPU; its entry with what was found."""
    entry = manifest.components[name]
    assert entry.plugins is not None
    device = torch.device("cuda", torch.cuda.current_device())
    backend = TensorRTBackend(entry.backend)
    plain, plugins = (
        backend.load_variant(bundle, manifest, name, device, plugins=each) for each in (False, True)
    )
    first = plain.parts[0]
    assert isinstance(first, Engine)
    stream = torch.cuda.Stream(device)  # an engine avoids the default one, which costs events
    with torch.cuda.stream(stream):
        found = measure(plain, plugins, random_inputs(first, device), entry.precision)
    measured = {**entry.plugins.measured, torch.cuda.get_device_name(device): found}
    return replace(entry, plugins=replace(entry.plugins, measured=measured))


def without_slower(bundle: Path, entry: ComponentEntry) -> ComponentEntry:
    """The entry without its engines with plugins, and them removed, if this GPU is the only one
    they are for and they are not faster on it. What was measured stays.
    """
    variant = entry.plugins
    assert variant is not None
    device = torch.device("cuda", torch.cuda.current_device())
    if entry.targets != (capability(device),):
        return entry
    if variant.faster_on(torch.cuda.get_device_name(device)):
        return entry
    for part in variant.parts:
        (bundle / part).unlink()
    files = {name: digest for name, digest in entry.files.items() if name not in variant.parts}
    return replace(entry, files=files, plugins=replace(variant, parts=()))


def choose_in_bundle(bundle: Path) -> dict[str, Measurement]:
    """Measure every component of a bundle that has plugins, and write what was found into it.

    Returns the measurements by component. Raises BundleError for a bundle without plugins,
    BackendError where its engines do not run.
    """
    manifest = Manifest.read(bundle)
    names = [
        name for name, entry in manifest.components.items()
        if entry.plugins is not None and entry.plugins.parts
    ]  # fmt: skip
    if not names:
        raise BundleError(
            f"{bundle} holds no engines with plugins; build it with --plugins and --backend "
            f"{' or '.join(LIBRARIES)}"
        )
    for name in names:
        state = TensorRTBackend(manifest.components[name].backend).available()
        if not state.ok:
            raise BackendError(f"nothing was measured: {state.reason}; {state.fix}")
    found = {}
    for name in names:
        entry = choose(bundle, manifest, name)
        assert entry.plugins is not None
        found[name] = entry.plugins.measured[torch.cuda.get_device_name()]
        manifest = manifest.with_entry(name, entry)
    with replacing(bundle / MANIFEST) as new:
        new.write_text(manifest.to_json(), encoding="utf-8")
        new.chmod(0o644)  # as `bundle.writing` leaves it
    return found
