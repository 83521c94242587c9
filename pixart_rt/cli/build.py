"""`pixart-rt build`: a checkpoint to a bundle of engines."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixart_rt.backends import BACKENDS
from pixart_rt.buckets import RESOLUTIONS
from pixart_rt.bundle import BUNDLE, MANIFEST
from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.config import (
    COMPONENTS,
    PUBLISHED,
    CfgNull,
    EngineConfig,
    Precision,
    Quality,
    Weights,
)
from pixart_rt.errors import ConfigError
from pixart_rt.files import check_folder

if TYPE_CHECKING:
    from pixart_rt.export.build import BuildResult

_NAMES = {name: name for name in COMPONENTS} | {"vae": "vae_decoder", "t5": "text_encoder"}
_WITHOUT_TEXT = ("transformer", "vae_decoder")  # all that random weights can give
_GIB = 2**30


def build(
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, xl-random, a diffusers folder, a .pth file or a Hugging Face id. "
            "Default: the published PixArt-alpha for --res."
        ),
    ] = None,
    res: Annotated[int, typer.Option(help="Pixels per side: 256, 512 or 1024.")] = 1024,
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder. Default: engines/<model>-<res>.")
    ] = None,
    backend: Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM", help="GPU to build for, such as sm80; repeat it or separate by commas."
        ),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of transformer and VAE. Default: the backend's.")
    ] = None,
    text_precision: Annotated[
        Precision | None, typer.Option(help="Of the text encoder. Default: the backend's.")
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(
            help="Comma list of transformer, vae, text_encoder. Default: all that the model has."
        ),
    ] = None,
    quality: Annotated[
        Quality, typer.Option(help="Roundings of the transformer; not high: torch backends only.")
    ] = Quality.HIGH,
    plugins: Annotated[
        bool,
        typer.Option(
            "--plugins",
            help="TensorRT: a second transformer engine on our own kernels, used where it is "
            "measured to be faster.",
        ),
    ] = False,
    text_encoder: Annotated[
        str, typer.Option(help="engine: as the others; torch: kept in PyTorch.")
    ] = "engine",
    max_batch: Annotated[int, typer.Option(help="Images per call of the engines.")] = 1,
    weights: Annotated[
        Weights, typer.Option(help="Of the transformer's blocks; not full: torch backends only.")
    ] = Weights.FULL,
    text_weights: Annotated[
        Weights, typer.Option(help="Of the text encoder; not full: where PyTorch runs it.")
    ] = Weights.FULL,
    vram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Choose what fits, such as 8G (see `plan`); torch only."),
    ] = None,
    cfg_null: Annotated[
        CfgNull | None, typer.Option(help="The unconditional branch. Default: the checkpoint's.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of a .pth (it does not say).")
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Latent pixels per side of a .pth: resolution / 8.")
    ] = None,
    max_text_tokens: Annotated[
        int | None,
        typer.Option(help="Prompt length if the checkpoint does not say: 120, 300."),
    ] = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(help="A ControlNet's folder or .pth, trained for the model."),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(help="GiB that building a text encoder may take. Default: 80 % of free."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle of other settings at --out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build a bundle of engines from a checkpoint.

    Every component is compared with float32 PyTorch before the bundle is accepted. A second build
    of the same thing is found and not repeated. A bundle of other settings is only replaced with
    --force.

    \b
    Examples:
      pixart-rt build --model tiny --res 1024
      pixart-rt build --res 512 --out engines/alpha-512
      pixart-rt build --model xl-random --backend tensorrt-rtx --target sm80,sm89 \\
          --components transformer,vae
      pixart-rt build --model PixArt-XL-2-1024-MS.pth --sample-size 128
    """
    if res not in RESOLUTIONS:
        raise ConfigError(f"--res {res} is not supported; choose one of {_list(RESOLUTIONS)}")
    model = model or PUBLISHED[res]
    out = out or Path("engines") / f"{_label(model)}-{res}"
    if not (out / MANIFEST).is_file():  # else it may be this very build, and need no writing
        check_folder(out, BUNDLE, force=force)
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise ConfigError(f"--max-memory {max_memory:g} is not supported; give GiB above 0")
    parts = _components(components, model)
    if vram is not None and backend == "auto":
        backend = "torch"  # the one whose tiers are all there
    config = engine_config(
        res, backend, _split(target or []), precision, text_precision, parts, text_encoder,
        max_batch, quality, plugins, weights, text_weights,
    )  # fmt: skip
    memory = None
    if vram is not None and controlnet is not None:
        raise ConfigError(
            "--vram is not supported with --controlnet, whose memory is not predicted; leave one "
            "out"
        )
    if vram is not None:
        config, memory = _fit(model, config, vram)
    from pixart_rt.export.build import build as build_bundle  # torch, onnx: seconds to import

    with Steps() as progress:
        result = build_bundle(
            model,
            out,
            config,
            cfg_null=cfg_null,
            max_memory=None if max_memory is None else int(max_memory * _GIB),
            heads=heads,
            sample_size=sample_size,
            max_text_tokens=max_text_tokens,
            controlnet=controlnet,
            memory=memory,
            force=force,
            progress=progress,
        )
    _show(result, as_json)


def engine_config(
    res: int,
    backend: str,
    targets: tuple[str, ...],
    precision: Precision | None,
    text_precision: Precision | None,
    components: tuple[str, ...],
    text_encoder: str,
    max_batch: int,
    quality: Quality,
    plugins: bool,
    weights: Weights,
    text_weights: Weights,
) -> EngineConfig:
    """The options as a checked config; what was left out becomes the chosen backend's default."""
    if text_encoder not in ("engine", "torch"):
        raise ConfigError(f"--text-encoder {text_encoder!r} is neither engine nor torch")
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"--backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    asked = EngineConfig(  # refuses what cannot be before torch is loaded
        resolution=res,
        targets=targets,
        components=components,
        max_batch=max_batch,
        backend=backend,
        plugins=plugins,
    )
    from pixart_rt.backends import choose_backend
    from pixart_rt.export.build import default_precision

    if backend == "auto":
        backend, reason = choose_backend(asked.targets)
        note(f"backend: {reason}")
    text_backend = "torch" if text_encoder == "torch" else None
    return EngineConfig(
        resolution=res,
        backend=backend,
        precision=precision or default_precision(backend)[0],
        text_precision=text_precision or default_precision(text_backend or backend)[1],
        max_batch=max_batch,
        targets=asked.targets,
        components=components,
        text_encoder_backend=text_backend,
        quality=quality,
        plugins=plugins,
        weights=weights,
        text_weights=text_weights,
    )


def _fit(model: str, config: EngineConfig, vram: str) -> tuple[EngineConfig, dict[str, Any]]:
    """The config of the best tier that fits, and what the manifest keeps of the choice."""
    from pixart_rt.cli.plan import forecast_record
    from pixart_rt.memory.tiers import fit_engine, parse_bytes

    limit = parse_bytes(vram)
    tier = fit_engine(model, config, limit)
    peak = tier.forecast.peak / _GIB
    note(f"memory: tier {tier.name}, predicted peak {peak:.2f} GiB of {limit / _GIB:g}")
    return tier.config, {"vram": limit, "tier": tier.name, **forecast_record(tier.forecast)}


def _components(asked: str | None, model: str) -> tuple[str, ...]:
    """Component names in the order they are built, from the names users know."""
    if asked is None:
        if model == "xl-random":
            return _WITHOUT_TEXT
        lone = (Path(model) / "config.json").is_file() or model.endswith(".pth")
        return ("transformer",) if lone else COMPONENTS
    names = _split([asked])
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        raise ConfigError(
            f"--components {asked!r} is not supported; it is a comma list of "
            f"{_list(sorted(_NAMES))}"
        )
    chosen = {_NAMES[name] for name in names}
    return tuple(name for name in COMPONENTS if name in chosen)


def _split(values: list[str]) -> tuple[str, ...]:
    """Values that were repeated, separated by commas, or both; each once."""
    words = [word.strip() for value in values for word in value.split(",")]
    return tuple(dict.fromkeys(word for word in words if word))


def _label(model: str) -> str:
    """A folder name for a model: the last part of an id or path, without .pth."""
    return Path(model).resolve().name.removesuffix(".pth") or "model"


def generate_command(bundle: Path) -> str:
    """A command, ready to be copied, that draws the first image with a bundle."""
    prompt = '"a red circle above a blue square"'
    return f"pixart-rt generate {prompt} --bundle {shlex.quote(str(bundle))} -o out.png"


def _list(values: object) -> str:
    return ", ".join(str(value) for value in values)  # type: ignore[attr-defined]


def _show(result: BuildResult, as_json: bool) -> None:
    if result.cached:  # the notes of a build were shown before its first long step
        for line in result.notes:
            note(line)
    if not as_json:
        typer.echo(str(result.path))
        if set(COMPONENTS) <= result.manifest.components.keys():
            note(f"next: {generate_command(result.path)}")
        return
    manifest = result.manifest
    print_json(
        {
            "path": str(result.path),
            "cached": result.cached,
            "key": manifest.key,
            "engine_config": manifest.engine_config,
            "components": {
                name: {"backend": entry.backend, "precision": entry.precision,
                       "targets": list(entry.targets), "parity": entry.parity,
                       "plugins": None if entry.plugins is None else asdict(entry.plugins)}
                for name, entry in manifest.components.items()
            },
            "build": manifest.build,
            "notes": result.notes,
        }
    )  # fmt: skip
