"""An engine bundle: a folder of engines, and a manifest that says what they are.

    bundle/
      manifest.json           written last; a folder without one is not a bundle
      text_encoder/  transformer/  vae_decoder/      engines, per component
      modulator.safetensors   timestep, size and aspect ratio to modulation, float32
      text_side.safetensors   caption projection, keys and values, once for each prompt
      null_prompt.safetensors the text encoder's output for the empty prompt
      y_embedding.safetensors only with the original unconditional convention
      preview.safetensors     latents to the colours of a preview, with a VAE decoder
      vae_encoder/            control images to latents, with a ControlNet; run by PyTorch
      tokenizer/  scheduler/  as diffusers writes them

A bundle is written to a temporary folder next to its place and renamed: whole or absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pixart_rt.config import (
    EngineConfig,
    ModelConfig,
    Precision,
    Quality,
    SamplingDefaults,
    Scheduler,
    TextPlace,
    Weights,
)
from pixart_rt.errors import BundleError
from pixart_rt.files import Kind, read_json, replacing_folder
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.typed import check_types

FORMAT_VERSION = 4
READABLE = (3, FORMAT_VERSION)  # 3 has no measured memory
MANIFEST = "manifest.json"
WEIGHTS = (".safetensors", ".bin", ".onnx", ".engine", ".pt2")  # suffixes of what is loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Engines without and with plugins side by side on one GPU."""

    plain: float  # milliseconds, a median
    plugins: float
    right: bool  # whether the outputs agree within the precision's bounds
    difference: str  # how far they are apart
    shapes: dict[str, list[int]]  # of the inputs
    date: str

    @property
    def faster(self) -> bool:
        """Whether the plugins are what should run."""
        return self.right and self.plugins < self.plain


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginVariant:
    """The same component with plugins. The plain engines run where nothing says it is faster."""

    parts: tuple[str, ...]  # engine files in the order they run; none if found slower and removed
    parity: dict[str, Any]  # the numerics gate's figures
    measured: dict[str, Measurement] = field(default_factory=dict)  # by the GPU's name

    def faster_on(self, gpu: str) -> bool:
        """Whether it was measured on a GPU of this name, and is right and faster there."""
        return bool(self.parts) and gpu in self.measured and self.measured[gpu].faster

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PluginVariant:
        measured = {gpu: Measurement(**found) for gpu, found in values["measured"].items()}
        return cls(**{**values, "parts": tuple(values["parts"]), "measured": measured})


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationMemory:
    """Bytes that a call takes beyond weights and inputs, measured when the bundle was built."""

    how: str  # the device, and what ran there
    peaks: list[list[int]]  # [size, bytes], smallest first; sizes as in memory/activations.py

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.peaks]
        counts = all(type(count) is int and count >= 0 for pair in self.peaks for count in pair)
        if not sizes or not counts or sizes != sorted(set(sizes)):
            raise ValueError(f"its measured memory is {self.peaks}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentEntry:
    """One component of a bundle."""

    backend: str  # the backend that runs it
    precision: str
    parts: tuple[str, ...]  # engine files in the order they run, relative to the bundle
    files: dict[str, str]  # every file of the component, relative to the bundle -> sha256
    targets: tuple[str, ...] = ()  # compute capabilities, for engines that have them
    profiles: list[dict[str, list[int]]] = field(default_factory=list)
    """Shapes the engine accepts: per profile, dimension name -> [min, opt, max]."""
    parity: dict[str, Any] = field(default_factory=dict)  # the numerics gate's figures
    plugins: PluginVariant | None = None  # of a build with plugins
    memory: ActivationMemory | None = None  # of bundles since format 4

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComponentEntry:
        """An entry as JSON has it. Raises KeyError, TypeError or ValueError for a damaged one."""
        variant, memory = values.get("plugins"), values.get("memory")
        plugins = None if variant is None else PluginVariant.from_dict(variant)
        measured = None if memory is None else ActivationMemory(**memory)
        tuples = {name: tuple(values[name]) for name in ("parts", "targets")}
        return cls(**{**values, **tuples, "plugins": plugins, "memory": measured})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that a bundle is. The same class writes and checks it."""

    format_version: int = FORMAT_VERSION
    pixart_rt_version: str
    key: str  # hash of all that determines the engines; equal keys need no second build
    created: str  # ISO 8601, UTC
    model: dict[str, str]  # name, source, sha256 of the weights, config_sha256
    model_config: dict[str, Any]
    engine_config: dict[str, Any]
    components: dict[str, ComponentEntry]
    files: dict[str, str]  # files that belong to no component, relative path -> sha256
    vae: dict[str, Any]  # scaling_factor, latent_channels, preview_rms_error (colours 0..1)
    scheduler: str  # the sampler that the weights were trained for, and the default
    buckets: list[list[int]]  # [height, width] in pixels
    versions: dict[str, str]  # of the libraries that built it
    build: dict[str, Any]  # seconds and peak memory per step
    controlnet: dict[str, Any] | None = None  # settings of the ControlNet in the transformer
    sampling: dict[str, Any] = field(default_factory=dict)  # of SamplingDefaults; older: none

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.model_config)

    @property
    def control(self) -> ControlNetConfig | None:
        """Of the ControlNet in the transformer, which then takes control images."""
        return None if self.controlnet is None else ControlNetConfig.from_dict(self.controlnet)

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """The model's own guidance and steps, for requests that say nothing."""
        return SamplingDefaults(**self.sampling)

    @property
    def quality(self) -> Quality:
        return Quality(self.engine_config.get("quality", Quality.HIGH))

    @property
    def text_place(self) -> TextPlace:
        """Where the text encoder's weights are, unless a pipeline is told otherwise."""
        return TextPlace(self.engine_config.get("text_place", TextPlace.RESIDENT))

    @property
    def vae_tiling(self) -> bool:
        """Whether images are decoded in tiles, unless a pipeline is told otherwise."""
        return bool(self.engine_config.get("vae_tiling", False))

    def weights_of(self, component: str) -> Weights:
        """How a component's weights are kept when it is loaded."""
        key = {"transformer": "weights", "text_encoder": "text_weights"}.get(component, "")
        return Weights(self.engine_config.get(key, Weights.FULL))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def with_entry(self, name: str, entry: ComponentEntry) -> Manifest:
        """A copy in which a component has another entry."""
        return replace(self, components={**self.components, name: entry})

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """The manifest of a bundle, or a BundleError that says what is wrong with the folder."""
        path = Path(bundle) / MANIFEST
        if not path.is_file():
            raise BundleError(
                f"{bundle} is not a bundle: it has no {MANIFEST}; "
                f"check the path, or make one with `pixart-rt build --model tiny --out {bundle}`"
            )
        try:
            values = read_json(path)
            found = values.get("format_version")
        except (ValueError, AttributeError) as error:
            raise BundleError(f"{path} is damaged ({error}); build the bundle again") from error
        if found not in READABLE:
            raise BundleError(
                f"{bundle} has bundle format {found}, this pixart_rt reads formats "
                f"{READABLE[0]} to {READABLE[-1]}; build it again"
            )
        try:
            entries = {
                name: ComponentEntry.from_dict(entry)
                for name, entry in values.pop("components").items()
            }
            manifest = cls(components=entries, **values)
            for record in (manifest, *entries.values()):
                check_types(record)
            manifest.check_engine()
            for name in manifest.all_files():
                _check_name(name)
            for entry in entries.values():
                more = () if entry.plugins is None else entry.plugins.parts
                for part in (*entry.parts, *more):
                    if part not in entry.files:
                        raise ValueError(f"{part} has no hash")
            _ = (
                manifest.config,
                manifest.control,
                manifest.quality,
                manifest.text_place,
                manifest.sampling_defaults,
                [manifest.weights_of(name) for name in manifest.components],
                Scheduler(manifest.scheduler),
            )  # refuse what cannot be, here
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{path} is damaged ({error}); build the bundle again") from error

    def check_engine(self) -> None:
        """ValueError for settings of the engines that the pipeline reads and that cannot be."""
        engine = self.engine_config
        EngineConfig(
            **{name: engine[name] for name in ("resolution", "max_batch") if name in engine}
        )
        _ = Precision(engine.get("precision", Precision.FP32))
        if not isinstance(engine.get("vae_tiling", False), bool):
            raise ValueError(f"vae_tiling is {engine['vae_tiling']!r}")
        if any(len(bucket) != 2 or min(bucket) < 1 for bucket in self.buckets):
            raise ValueError("a bucket is no height and width")

    def all_files(self) -> dict[str, str]:
        """Every file of the bundle but the manifest, with its sha256."""
        merged = dict(self.files)
        for entry in self.components.values():
            merged.update(entry.files)
        return merged


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path, paths: list[Path]) -> dict[str, str]:
    """Relative path -> sha256 of files below root."""
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(paths)}


def _check_name(name: str) -> None:
    """ValueError for a file that is not inside the bundle."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name} is not inside the bundle")


def damaged_files(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """The files that are not what the manifest says: relative path -> what they are.

    Files that are not listed count where they could be loaded in place of those that are: weights,
    and anything next to listed files. Others, such as a folder of images, are the user's.
    """
    unlisted = f"not listed in {MANIFEST} (remove it)"
    damaged = dict.fromkeys(_unlisted(Path(bundle), manifest), unlisted)
    for name, expected in manifest.all_files().items():
        path = Path(bundle) / name
        if not path.is_file():
            damaged[name] = "missing"
        elif sha256(path) != expected:
            damaged[name] = "changed"
    return damaged


def _unlisted(bundle: Path, manifest: Manifest) -> list[str]:
    listed = {MANIFEST, *manifest.all_files()}
    folders = {parent for name in listed for parent in PurePosixPath(name).parents}
    found = []
    for folder in sorted(folders):
        place = bundle / folder
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            name = path.relative_to(bundle).as_posix()
            loaded = folder.parts or path.suffix in WEIGHTS
            if loaded and not path.is_dir() and name not in listed:
                found.append(name)
    return found


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target` that takes its place when the block ends well.

    Replaces a bundle that holds nothing but its own files (files.py); the caller has compared what
    it is. Raises ConfigError for anything else.
    """
    with replacing_folder(target, BUNDLE, force=True) as temporary:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):  # private by default; a bundle is not
            path.chmod(0o755 if path.is_dir() else 0o644)


def listed_files(folder: Path) -> set[str] | None:
    """The files of a bundle by its manifest, of this format or another; None for other folders."""
    try:
        values = read_json(Path(folder) / MANIFEST)
        if not (isinstance(values["format_version"], int) and values["pixart_rt_version"]):
            return None
        names = {MANIFEST, *values["files"]}
        for entry in values["components"].values():
            names |= set(entry["files"])
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


BUNDLE = Kind("a bundle", listed_files)
