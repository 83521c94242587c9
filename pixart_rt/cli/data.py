"""`pixart-rt data`: images to a feature store, and whether a store is worth it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_rt.buckets import RESOLUTIONS
from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.config import PUBLISHED, Precision
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import check_into, check_source

MULTI = {"multi": 1024}  # the paper's name for its last stage
_MOST_THREADS = 16

data = typer.Typer(
    name="data",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Make training data: extract features, draw edges, plan stages.\n\n\b\nExamples:\n"
    "  pixart-rt data extract images/ features/ --res 256 --model tiny\n"
    "  pixart-rt data plan --images 14000000 --epochs 0.44 --res 1024 --rates rates.json",
)


@data.command()
def extract(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="A folder with images and metadata.jsonl, or a subfolder for each class.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store to make or continue.")],
    res: Annotated[
        str, typer.Option(help="256, 512, 1024; or multi: 1024, as the paper calls it.")
    ] = "256",
    model: Annotated[
        str | None,
        typer.Option(help="tiny, a diffusers folder or a hub id. Default: the published one."),
    ] = None,
    square: Annotated[
        bool, typer.Option("--square", help="Crop to the square instead of 40 aspect ratios.")
    ] = False,
    caption_column: Annotated[
        str, typer.Option(help="The column of metadata.jsonl that holds the captions.")
    ] = "text",
    classes: Annotated[
        bool,
        typer.Option("--classes", help="Subfolders are classes, even next to a metadata.jsonl."),
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Print the plan and stop; nothing is written.")
    ] = False,
    probe: Annotated[int, typer.Option(help="Images that the plan is measured on.")] = 32,
    precision: Annotated[
        Precision, typer.Option(help="Of the VAE; features are stored as fp16.")
    ] = Precision.FP32,
    text_precision: Annotated[
        Precision | None,
        typer.Option(help="Of the text encoder. Default: bf16 on a GPU, else fp32."),
    ] = None,
    max_text_tokens: Annotated[
        int | None, typer.Option(help="Caption length. Default: the model's, 120 or 300.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1. Default: a GPU if there is one.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images encoded together.")] = 8,
    threads: Annotated[
        int | None, typer.Option(help="Threads that read images. Default: one a core, at most 16.")
    ] = None,
    shard_images: Annotated[int, typer.Option(help="Images a shard; what a kill can lose.")] = 512,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan (--plan-only) or the result as JSON.")
    ] = False,
) -> None:
    """Encode images and captions into a feature store.

    Prints a plan, measured on a few images, then makes the store; the same command continues one
    that was stopped, and several at once share the work. Images that cannot be read are listed in
    OUT/skipped.jsonl.

    \b
    Examples:
      pixart-rt data extract images/ features/ --res 256 --model tiny
      pixart-rt data extract images/ features/ --res multi --caption-column caption
      pixart-rt data extract imagenet/train/ features/ --res 256 --square --classes
      pixart-rt data extract images/ features/ --res 512 --plan-only --json > rates.json
    """
    resolution = _resolution(res)
    if max_text_tokens is not None and max_text_tokens < 1:
        raise ConfigError(
            f"--max-text-tokens {max_text_tokens} is not supported; it must be positive"
        )
    check_source(images, "images and a metadata.jsonl, or a subfolder for each class")
    check_into(out)
    from pixart_rt.data.class_folder import open_images
    from pixart_rt.data.extract import (  # torch, pyarrow: seconds
        ExtractConfig,
        Extraction,
        refuse_other_folder,
    )

    refuse_other_folder(out)

    config = ExtractConfig(
        resolution=resolution,
        square=square,
        shard_images=shard_images,
        batch=batch,
        threads=threads or min(os.cpu_count() or 1, _MOST_THREADS),
    )
    folder = open_images(images, caption_column, classes=classes or None)
    if folder.classes:
        reason = "--classes" if classes else "there is no metadata.jsonl"
        note(
            f"{len(folder.classes)} subfolders are classes ({reason}): labels, and no captions; "
            f"{folder.classes[0]} is label 0"
        )
    name = model or PUBLISHED[resolution]
    with Steps() as progress:
        progress("loading the encoders", 0, 1)
        encoder = _open_encoder(name, device, precision, text_precision, max_text_tokens)
        extraction = Extraction(folder, out, encoder, config, name)
        extraction.check_target()
        planned = None
        if plan_only or extraction.missing_shards():
            progress("measuring", 0, 1)
            planned = _plan(extraction, probe)
        if not plan_only:
            extraction.run(progress)
    if not plan_only:
        _show(extraction, as_json)
    elif as_json:
        print_json(planned)


@data.command()
def edges(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="A folder with images and metadata.jsonl.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make or continue.")],
    kind: Annotated[str, typer.Option(help="canny; or hed, which needs controlnet-aux.")] = "canny",
    res: Annotated[str, typer.Option(help="256, 512, 1024 or multi, as for extract.")] = "256",
    square: Annotated[
        bool, typer.Option("--square", help="Crop to the square, as for extract.")
    ] = False,
    caption_column: Annotated[
        str, typer.Option(help="The column of metadata.jsonl that holds the captions.")
    ] = "text",
    threads: Annotated[
        int | None, typer.Option(help="Threads. Default: one a core, at most 16.")
    ] = None,
) -> None:
    """Draw the edges of images, for a ControlNet: a folder to extract a second store of.

    Edges are those of each image as `extract` cuts it, so give both the same --res and --square.
    Then `pixart-rt data extract OUT` makes the second store. A stopped run resumes.

    \b
    Examples:
      pixart-rt data edges images/ edges/ --res 256
      pixart-rt data edges images/ edges/ --res multi --kind hed
    """
    resolution = _resolution(res)
    check_source(images, "images and a metadata.jsonl")
    check_into(out)
    from pixart_rt.data.edges import EdgeKind, edge_finder  # numpy, Pillow: part of a second

    if kind not in list(EdgeKind):
        raise ConfigError(f"--kind {kind} is not supported; choose one of {', '.join(EdgeKind)}")
    from pixart_rt.data.control import draw_edges
    from pixart_rt.data.crop import bucket_table
    from pixart_rt.data.folder import ImageFolder

    folder = ImageFolder(images, caption_column)
    table = bucket_table(resolution, square=square)
    workers = threads or min(os.cpu_count() or 1, _MOST_THREADS)
    with Steps() as progress:
        finder = edge_finder(EdgeKind(kind))
        left_out = draw_edges(folder, out, table, finder, threads=workers, progress=progress)
    if left_out:
        note(f"warning: {left_out} images cannot be read; their lines have no edges")
    typer.echo(str(out))


@data.command()
def plan(
    images: Annotated[float, typer.Option(help="Images of the data set, such as 14e6.")],
    epochs: Annotated[float, typer.Option(help="How often the stage uses each; may be below 1.")],
    res: Annotated[str, typer.Option(help="256, 512, 1024 or multi.")] = "256",
    rates: Annotated[
        Path | None,
        typer.Option(help="What `data extract --plan-only --json` measured. Options go before it."),
    ] = None,
    vae_rate: Annotated[float | None, typer.Option(help="Images/s through the VAE.")] = None,
    text_rate: Annotated[
        float | None, typer.Option(help="Captions/s through the text encoder.")
    ] = None,
    read_rate: Annotated[float | None, typer.Option(help="Images/s read and resized.")] = None,
    write_rate: Annotated[float | None, typer.Option(help="MB/s written to the store.")] = None,
    train_rate: Annotated[
        float | None, typer.Option(help="Images/s of training from features, if measured.")
    ] = None,
    bytes_per_image: Annotated[
        float | None, typer.Option(help="Bytes of an image in the store.")
    ] = None,
    free: Annotated[float | None, typer.Option(help="TB that the store may take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Decide for a training stage: a feature store, or encoding while training.

    Prints `store` or `online`, and the arithmetic on stderr. Rates are measured, not guessed: give
    a file of them or each one.

    \b
    Examples:
      pixart-rt data plan --images 10e6 --epochs 171 --res 256 --rates rates.json
      pixart-rt data plan --images 14e6 --epochs 0.44 --res 1024 --rates rates.json --free 20
    """
    resolution = _resolution(res)
    measured = {} if rates is None else _read_rates(rates, resolution)
    asked = {
        "vae_per_second": vae_rate,
        "text_per_second": text_rate,
        "read_per_second": read_rate,
        "write_bytes_per_second": None if write_rate is None else write_rate * 1e6,
        "bytes_per_image": bytes_per_image,
    }
    known = measured | {name: value for name, value in asked.items() if value is not None}
    missing = [name for name in asked if name not in known]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be measured first: `pixart-rt data extract IMAGES OUT "
            f"--res {res} --plan-only --json > rates.json`, then --rates rates.json"
        )
    from pixart_rt.data.planner import Rates, Stage, decide

    decision = decide(
        Stage(
            images=int(images),
            epochs=epochs,
            resolution=resolution,
            bytes_per_image=known["bytes_per_image"],
            flops_per_image=known.get("flops_per_image"),
            free_bytes=None if free is None else free * 1e12,
        ),
        Rates(
            vae=known["vae_per_second"],
            text=known["text_per_second"],
            read=known["read_per_second"],
            write_bytes=known["write_bytes_per_second"],
            train=train_rate,
        ),
    )
    if as_json:
        print_json(decision.to_dict())
        return
    for line in (*decision.arithmetic, decision.reason):
        note(line)
    typer.echo(decision.choice)


def _resolution(asked: str) -> int:
    names = {str(resolution): resolution for resolution in RESOLUTIONS} | MULTI
    if asked not in names:
        raise ConfigError(f"--res {asked} is not supported; choose one of {', '.join(names)}")
    return names[asked]


def _open_encoder(
    model: str,
    device: str | None,
    precision: Precision,
    text_precision: Precision | None,
    max_text_tokens: int | None,
) -> Any:
    """The FeatureEncoder of a model on a device that is here."""
    import torch

    from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, usual_text_precision

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name!r} cannot be used here ({error})") from error
    config = EncoderConfig(
        model=model,
        precision=precision,
        text_precision=text_precision or usual_text_precision(place),
        max_text_tokens=max_text_tokens,
    )
    return FeatureEncoder.open(config, place)


def _plan(extraction: Any, probe: int) -> dict[str, Any]:
    """Measure, show and return the plan."""
    from pixart_rt.data.probe import make_plan

    made = make_plan(extraction, probe)
    for line in made.lines():
        note(line)
    return asdict(made) | {"store_bytes": made.store_bytes, "hours": made.hours}


def _show(extraction: Any, as_json: bool) -> None:
    manifest = extraction.manifest
    skipped = manifest.num_images - manifest.num_samples
    if not manifest.complete:
        note("other processes still make the last shards; the last of them completes the store")
    elif skipped:
        note(f"warning: {skipped} images were skipped, see {extraction.store / 'skipped.jsonl'}")
    if as_json:
        print_json({"path": str(extraction.store), **asdict(manifest)})
    else:
        typer.echo(str(extraction.store))


def _read_rates(path: Path, resolution: int) -> dict[str, float]:
    """The figures of a plan. Raises DataError for another file, ConfigError for other pixels."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = {name: float(value) for name, value in values.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} is not what `pixart-rt data extract --plan-only --json` prints ({error})"
        ) from error
    if found.get("resolution") != resolution:
        raise ConfigError(
            f"{path} was measured at {found.get('resolution', 0):g} pixels, --res asks for "
            f"{resolution}; measure again with that --res"
        )
    return found
