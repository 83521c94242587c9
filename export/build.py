"""`pixart-rt build`: a checkpoint becomes a bundle of engines that were checked, or nothing at all.

For each component: float32 reference outputs, module in the asked precision, exported program,
ONNX, engine, numerics gate. The manifest is written last and the folder renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

import pixart_rt
from pixart_rt.backends import choose_backend, default_device, get_backend
from pixart_rt.buckets import buckets
from pixart_rt.bundle import BUNDLE, MANIFEST, Manifest, damaged_files, hash_files, writing
from pixart_rt.checkpoints.bundle_module import VAE_ENCODER, save_module
from pixart_rt.checkpoints.sampling_defaults import read_sampling
from pixart_rt.config import COMPONENTS, CfgNull, EngineConfig, Precision
from pixart_rt.errors import BundleError, ConfigError
from pixart_rt.export.checkpoint_source import Source, open_source
from pixart_rt.export.component_spec import Plan, plan_component
from pixart_rt.export.engines import check_targets
from pixart_rt.files import check_folder
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_kv import TEXT_SIDE
from pixart_rt.model.vae import VaeEncoder
from pixart_rt.version import __version__

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
MEMORY_SHARE = 0.8  # of what is free, for a build that was given no limit
LIBRARIES = (
    "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt_rtx_cu13_libs", "tensorrt_rtx_cu13_bindings", "triton", "torchao",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Where the bundle is, whether it was there already, and what the caller should know."""

    path: Path
    cached: bool
    manifest: Manifest
    notes: list[str]


def default_precision(backend: str) -> tuple[Precision, Precision]:
    """Precision of transformer and VAE, and of the text encoder, when none is asked.

    Tensor cores want half precision; float16 for the first two, bfloat16 for T5, whose range
    float16 lacks. On a CPU float32 is both fastest and exact.
    """
    if backend.startswith("tensorrt"):
        return Precision.FP16, Precision.BF16
    if default_device(backend).type == "cuda":
        half = Precision.FP16 if backend.startswith("onnxruntime") else Precision.BF16
        return half, half
    return Precision.FP32, Precision.FP32


def build(
    model: str,
    out: str | Path,
    config: EngineConfig,
    *,
    cfg_null: CfgNull | None = None,
    max_memory: int | None = None,
    heads: int | None = None,
    sample_size: int | None = None,
    max_text_tokens: int | None = None,
    controlnet: Path | None = None,
    memory: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build a bundle of `model` at `out`.

    model: "tiny", "xl-random", a diffusers folder, a .pth file or a Hugging Face id.
    cfg_null: the unconditional convention; by default what the checkpoint says.
    max_memory: bytes a text encoder's engine may take to build; by default 80 % of what is free.
    heads, sample_size, max_text_tokens: what a checkpoint may not tell (see
        pixart_rt.checkpoints.transformer).
    controlnet: a ControlNet's folder or .pth, trained for `model`; the bundle's transformer then
        takes control images.
    memory: what was predicted of the bundle's memory; kept in the manifest's `build`.
    force: replace a bundle of other settings. One of the same settings is replaced unasked where
        it is damaged, or its weights or our code changed; what is no bundle never is (files.py).
    progress: called with a step's name, steps done and steps in all.
    Raises ConfigError, CheckpointError, BuildError, NumericsError; then `out` is as it was.
    """
    out = Path(out)
    if not (out / MANIFEST).is_file():  # else it may be this very build, and need no writing
        check_folder(out, BUNDLE, force=force)
    report = progress or (lambda _step, _done, _total: None)
    config = _resolve(config)
    report(f"reading {model}", 0, 1)
    source = open_source(
        model,
        config.resolution,
        components=config.components,
        heads=heads,
        sample_size=sample_size,
        max_text_tokens=max_text_tokens,
        cfg_null=cfg_null,
        controlnet=controlnet,
    )
    source.check_fits(config.components)
    usable = max_memory or int(MEMORY_SHARE * psutil.virtual_memory().available)
    plans = [plan_component(name, source, config, usable) for name in config.components]
    key = bundle_key(source, config, {plan.component: len(plan.parts) for plan in plans})
    found = _cached(out, key)
    if found is not None:
        note = f"{out} already holds this build (key {key[:12]}); nothing to do"
        return BuildResult(out, True, found, [note])
    check_folder(out, BUNDLE, force=True)
    source.check_readable(config.components)
    notes = [*_replaced(out, source, config, force=force), *_notes(plans, usable)]
    for note in notes:
        logger.info("%s", note)
    started = time.monotonic()
    with writing(out) as folder:
        manifest = _empty_manifest(folder, source, config, key)
        manifest = _compile_all(folder, manifest, plans, config, report)
        if "vae_decoder" in config.components:
            from pixart_rt.export.preview_colors import write_preview  # PIL

            report("vae_decoder: previews", len(plans), len(plans))
            fit = write_preview(folder, source.vae())
            manifest = replace(manifest, vae={**manifest.vae, **fit})
        seconds = {**manifest.build, "total_seconds": round(time.monotonic() - started, 1)}
        if memory is not None:
            seconds["memory"] = memory
        manifest = replace(
            manifest, build=seconds, files=_write_rest(folder, source, DTYPES[config.precision])
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _replaced(out, source, config, force=force)  # another build may have ended meanwhile
    return BuildResult(out, False, manifest, notes)


def bundle_key(source: Source, config: EngineConfig, num_parts: dict[str, int]) -> str:
    """The hash of everything that determines the engines. Equal keys need no second build."""
    parts = {
        "code": _code_sha256(),
        "weights": source.weights_sha256,
        "model": source.config.to_dict(),
        "controlnet": None if source.controlnet is None else source.controlnet.to_dict(),
        "engine": asdict(config),
        "parts": num_parts,
        "versions": installed_versions(),
    }
    if config.backend == "aoti":  # the one backend whose engines are of the machine
        device = default_device(config.backend)
        name = torch.cuda.get_device_name() if device.type == "cuda" else None
        parts["machine"] = name or torch.backends.cpu.get_cpu_capability()
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


GRAPH_CODE = (
    "model/*.py", "checkpoints/*.py", "kernels/*.py", "export/*.py", "export/*/*.py",
    "backends/trt/*plugin*.py",
)  # fmt: skip


def _code_sha256() -> str:
    """The hash of our own code that a graph is made by."""
    root = Path(pixart_rt.__file__).parent
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(p for part in GRAPH_CODE for p in root.glob(part)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """The libraries that shape an engine, as installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _resolve(config: EngineConfig) -> EngineConfig:
    """Replace `auto` by a backend that works here, and refuse targets it does not know."""
    if config.backend == "auto":
        backend, reason = choose_backend(config.targets)
        logger.info("backend %s: %s", backend, reason)
        config = replace(config, backend=backend)
    get_backend(config.backend)
    if config.text_encoder_backend is not None:
        get_backend(config.text_encoder_backend)
    precision_of = [(config.backend, config.precision)]
    precision_of.append((config.text_encoder_backend or config.backend, config.text_precision))
    if any(b.startswith("onnxruntime") and p is Precision.BF16 for b, p in precision_of):
        raise ConfigError(
            "--precision bf16 was requested, but ONNX Runtime has no bfloat16 kernels for these "
            "graphs; use fp16 or fp32, or another --backend"
        )
    if config.backend.startswith("tensorrt"):
        targets = check_targets(config.backend, config.targets)
        if config.plugins:
            from pixart_rt.export.plugins.graph import check_plugin_targets  # onnx

            check_plugin_targets(targets)
        return replace(config, targets=targets)
    if config.targets:
        raise ConfigError(
            f"--target {', '.join(config.targets)} was requested, but backend {config.backend} has "
            "no targets; leave it out, or use --backend tensorrt-rtx"
        )
    return config


def _cached(out: Path, key: str) -> Manifest | None:
    """The manifest of a whole bundle with this key at `out`, else None."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = Manifest.read(out)
    except BundleError as error:
        logger.warning("%s", error)
        return None
    if manifest.key != key:
        return None
    damaged = damaged_files(out, manifest)
    if damaged:
        logger.warning("%s is damaged (%s); it is built again", out, ", ".join(damaged))
        return None
    return manifest


def _replaced(out: Path, source: Source, config: EngineConfig, *, force: bool) -> list[str]:
    """What is replaced and why; nothing where nothing is. ConfigError for other settings."""
    if not (out / MANIFEST).is_file():
        return []
    try:
        different = _differences(Manifest.read(out), source, config)
    except BundleError:  # of another version, or damaged: its settings are not known
        different = ["its manifest"]
    if different and not force:
        raise ConfigError(
            f"{out} is a bundle of other settings ({', '.join(different)}); choose another folder, "
            "or replace it with --force"
        )
    why = ", ".join(different) or "its files, its weights or the code changed"
    return [f"{out} is replaced: {why}"]


def _differences(found: Manifest, source: Source, config: EngineConfig) -> list[str]:
    """The settings in which a bundle differs from what is asked, in words. Weights of the same
    origin that changed are not a setting: building them again is what was requested.
    """
    asked = json.loads(json.dumps(asdict(config)))
    usual = json.loads(json.dumps(asdict(EngineConfig())))  # of settings younger than the bundle
    built = {name: found.engine_config.get(name, usual[name]) for name in asked}
    different = [
        f"{name} {built[name]}, not {value}"
        for name, value in asked.items()
        if built[name] != value
    ]
    if found.config != source.config:
        different.append("another model configuration")
    if found.control != source.controlnet:
        different.append("another ControlNet")
    origin = _origin(source)
    moved = [name for name, path in origin.items() if found.model.get(name) != path]
    if found.model.get("sha256") != source.weights_sha256 and moved:
        different.append(f"model {found.model.get('name')}, not {source.name}")
    return different


def _origin(source: Source) -> dict[str, str]:
    """Where the weights come from, by the manifest's names."""
    origin = {"source": _absolute(source.transformer_path)}
    if source.controlnet_path is not None:
        origin["controlnet"] = _absolute(source.controlnet_path)
    return origin


def _absolute(path: Path | None) -> str:
    return "random weights" if path is None else str(path.absolute())


def _notes(plans: list[Plan], memory: int) -> list[str]:
    """What is worth saying before the first long step."""
    notes = []
    for plan in plans:
        if plan.predicted_peak is not None:
            engines = f"{len(plan.parts)} engines" if len(plan.parts) > 1 else "one engine"
            notes.append(
                f"{plan.component}: {engines}, predicted peak memory "
                f"{plan.predicted_peak / 2**30:.1f} of {memory / 2**30:.1f} GiB that may be used"
            )
    missing = set(COMPONENTS) - {plan.component for plan in plans}
    if missing:
        notes.append(f"without {', '.join(sorted(missing))} this bundle cannot make images")
    return notes


def _empty_manifest(folder: Path, source: Source, config: EngineConfig, key: str) -> Manifest:
    vae = source.vae_config() if "vae_decoder" in source.components else None
    origin = None if source.transformer_path is None else source.checkpoint().origin
    scheduler, defaults = read_sampling(source.folder, source.name, origin)
    return Manifest(
        pixart_rt_version=__version__,
        key=key,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            "name": source.name,
            **_origin(source),
            "sha256": source.weights_sha256,
            "config_sha256": _hash_json(source.config.to_dict()),
        },
        model_config=source.config.to_dict(),
        engine_config=json.loads(json.dumps(asdict(config))),
        components={},
        files={},
        vae={} if vae is None else {
            "scaling_factor": vae["scaling_factor"], "latent_channels": vae["latent_channels"]
        },
        scheduler=scheduler,
        buckets=[[bucket.height, bucket.width] for bucket in buckets(config.resolution)],
        versions=installed_versions(),
        build={},
        controlnet=None if source.controlnet is None else source.controlnet.to_dict(),
        sampling=asdict(defaults),
    )  # fmt: skip


def _hash_json(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _compile_all(
    folder: Path, manifest: Manifest, plans: list[Plan], config: EngineConfig, report: Progress
) -> Manifest:
    """Compile and check every component; the manifest grows by an entry each."""
    from pixart_rt.export.component_build import compile_component  # onnx, onnxruntime

    for done, plan in enumerate(plans):
        text = plan.component == "text_encoder" and config.text_encoder_backend
        backend = text or config.backend
        started = time.monotonic()
        step = lambda what, name=plan.component, done=done: report(  # noqa: E731
            f"{name}: {what}", done, len(plans)
        )
        plugins = config.plugins and plan.component == "transformer"
        entry, stats = compile_component(
            folder, manifest, plan, backend, config.targets, step, plugins=plugins
        )
        stats["seconds"] = round(time.monotonic() - started, 1)
        manifest = replace(
            manifest.with_entry(plan.component, entry),
            build={**manifest.build, plan.component: stats},
        )
    report("writing the manifest", len(plans), len(plans))
    return manifest


def _write_rest(folder: Path, source: Source, dtype: torch.dtype) -> dict[str, str]:
    """Modulator, text side, tokenizer, scheduler and goldens; their hashes."""
    weights = source.modulator().state_dict()
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(state, folder / "modulator.safetensors")
    side = source.text_side(dtype).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in side.items()}, folder / TEXT_SIDE)
    if source.transformer_path is not None:
        null = source.checkpoint().y_embedding
        if null is not None:
            save_file({"y_embedding": null.contiguous()}, folder / "y_embedding.safetensors")
    if source.controlnet is not None and "vae_decoder" in source.components:
        vae = source.vae()
        (folder / VAE_ENCODER).mkdir()
        save_module(folder / VAE_ENCODER, VaeEncoder(vae), source.whole_vae_config())
    for name in ("tokenizer", "scheduler"):
        if source.folder is not None and (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, folder / name)
    shared = [path for path in folder.iterdir() if path.is_file()]
    for name in ("tokenizer", "scheduler", "golden", VAE_ENCODER):
        shared += [path for path in (folder / name).rglob("*") if path.is_file()]
    return hash_files(folder, shared)


__all__ = ["BuildResult", "build", "bundle_key", "default_precision", "installed_versions"]
