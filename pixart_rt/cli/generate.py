"""`pixart-rt generate`: a prompt to PNG files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixart_rt.approximations import one_approximation
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints.hub import unseen_words
from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.cli.failures import options_named
from pixart_rt.cli.previews import PreviewWriter, check_previews
from pixart_rt.config import SamplingConfig, Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.inference.request import DEFAULT_SEED, Request
from pixart_rt.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart_rt.inference.generation import PipelineOutput
    from pixart_rt.inference.pipeline import PixArtPipeline
    from pixart_rt.memory.tiers import Tier

OPTIONS = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative",
    "num_images_per_prompt": "--num",
    "aspect_ratio": "--aspect",
    "height": "--height",
    "width": "--width",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-stop",
    "seed": "--seed",
    "scheduler": "--scheduler",
}  # the command's word for each argument of the pipeline


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the image shows.", show_default=False)
    ],
    bundle: Annotated[Path, typer.Option(help="A folder that `pixart-rt build` made.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .png to write; with -n, name-0.png ...")
    ],
    num: Annotated[int, typer.Option("-n", "--num", min=1, help="How many images.")] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="All images on one captioned sheet.")
    ] = False,
    aspect: Annotated[
        str | None, typer.Option(help="Width:height, such as 3:2; the nearest trained size.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: 20; 4 with lcm, 1 with dmd.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. Default: 4.5; 1 with lcm and dmd.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image k draws from seed + k.")] = DEFAULT_SEED,
    negative: Annotated[str, typer.Option(help="What the image should not show.")] = "",
    scheduler: Annotated[
        Scheduler | None, typer.Option(help="The sampler. Default: the checkpoint's own.")
    ] = None,
    step_cache: Annotated[
        float | None,
        typer.Option(metavar="T", help="Approximate: skip steps of little change, such as 0.1."),
    ] = None,
    first_block_cache: Annotated[
        float | None,
        typer.Option(metavar="T", help="Approximate: the same by content; torch bundles only."),
    ] = None,
    guidance_stop: Annotated[
        float | None,
        typer.Option(metavar="PART", help="Approximate: guide only this part of the steps."),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="A picture of edges, for a bundle with a ControlNet.")
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Run so that it fits, such as 8G."),
    ] = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the prompts' embeddings there for the next time."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder for a small PNG of every step.")
    ] = None,
    preview_every: Annotated[
        int, typer.Option(min=1, help="With --preview: only every so many steps.")
    ] = 1,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory, nearly the same.")
    ] = False,
    no_auto_capture: Annotated[
        bool,
        typer.Option("--no-auto-capture", help="Several batches on a GPU: no CUDA graph of them."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate images from a prompt.

    Every PNG carries its prompt, seed, settings and the bundle's key in its text chunks.

    \b
    Examples:
      pixart-rt generate "a red circle above a blue square" --bundle engines/tiny-1024 -o out.png
      pixart-rt generate "a small green star" --bundle engines/tiny-1024 -o star.png --aspect 3:2
      pixart-rt generate "a blue star" --bundle engines/tiny-1024 -o sheet.png -n 4 --grid --seed 7
    """
    from pixart_rt.inference.images import refuse_existing

    with options_named(OPTIONS):
        request = Request(
            prompt=prompt,
            negative_prompt=negative,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_interval=None if guidance_stop is None else (0.0, guidance_stop),
            scheduler=scheduler,
            approximate=one_approximation(step_cache, first_block_cache),
            aspect_ratio=aspect,
            height=height,
            width=width,
        )
    paths = _output_paths(output, num, grid)
    refuse_existing(paths, force=force)
    if prompt_cache is not None and prompt_cache.exists() and not prompt_cache.is_dir():
        raise ConfigError(f"--prompt-cache {prompt_cache} is a file; name a folder")
    manifest = Manifest.read(bundle)
    with options_named(OPTIONS):
        sampling = request.resolved(manifest).sampling
    unseen = unseen_words(str(manifest.model["name"]), f"{request.prompt} {negative}")
    if unseen:
        note(
            f"warning: tiny has never seen {', '.join(unseen[:8])}; it knows coloured circles, "
            "squares, triangles and stars (docs/tiny.md), and draws what it takes this for"
        )
    if preview is not None:
        check_previews(preview, bundle, force=force)
    if (control_image is None) != (manifest.control is None):
        raise ConfigError(
            f"--control-image was {'not ' if control_image is None else ''}given, but {bundle} has "
            f"{'a' if manifest.control else 'no'} ControlNet; "
            + ("name a picture of edges" if manifest.control else "leave it out")
        )
    picture = None if control_image is None else _open_picture(control_image)
    writer = None
    if preview is not None:
        writer = PreviewWriter(preview, preview_every, sampling.num_inference_steps)
    fit = None if vram is None else _fit(bundle, manifest, vram, vae_tiling)
    tiled = fit.config.vae_tiling if fit else vae_tiling or manifest.vae_tiling
    loading = {
        "prompt_cache": prompt_cache,
        "text_place": fit.config.text_place if fit else None,
        "auto_capture": not no_auto_capture and fit is None,  # a graph's memory is not predicted
    }
    at_once = fit.config.max_batch if fit else int(manifest.engine_config["max_batch"])
    options = {"num_images_per_prompt": num, "vae_tiling": tiled, "control_image": picture}
    with options_named(OPTIONS):
        result, seconds = _run(bundle, at_once, loading, request, options, writer)
    facts = _facts(result, manifest, negative, sampling, tiled)
    if control_image is not None:
        facts = [{**fact, "control_image": control_image.name} for fact in facts]
    written = _write(result, facts, paths, grid, force)
    if as_json:
        print_json({"files": [str(path) for path in written], "images": facts,
                    "seconds": round(seconds, 3)})  # fmt: skip
    else:
        for path in written:
            typer.echo(str(path))


def _fit(bundle: Path, manifest: Manifest, vram: str, vae_tiling: bool) -> Tier:
    """The way of running the bundle that fits, said in a note."""
    from pixart_rt.memory.tiers import fit_bundle, parse_bytes

    fit = fit_bundle(bundle, manifest, parse_bytes(vram), vae_tiling=vae_tiling)
    tiles = ", the VAE in tiles" if fit.config.vae_tiling else ""
    note(
        f"memory: text encoder {fit.config.text_place}, {fit.config.max_batch} at once{tiles}, "
        f"predicted peak {fit.forecast.peak / 2**30:.2f} GiB"
    )
    return fit


def _open_picture(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"--control-image {path} cannot be read ({error})") from error


def _output_paths(output: Path, num: int, grid: bool) -> list[Path]:
    """FILE itself for one image or a sheet, else name-0.png to name-(n-1).png beside it."""
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output} was asked; images are PNG, so name it {output}.png")
    if num == 1 or grid:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(num)]


def _run(
    bundle: Path,
    at_once: int,
    loading: dict[str, Any],
    request: Request,
    options: dict[str, Any],
    previews: PreviewWriter | None,
) -> tuple[PipelineOutput, float]:
    """The images, `at_once` in a batch, and the seconds they took without loading the bundle."""
    with Steps() as progress:
        progress(f"loading {bundle}", 0, 1)
        from pixart_rt.inference.pipeline import (
            PixArtPipeline,  # torch, diffusers: seconds to import
        )

        def write(pipe: PixArtPipeline, step: int, _timestep: Any, tensors: Any) -> None:
            assert previews is not None
            previews(pipe, step, tensors)

        pipe = PixArtPipeline.from_bundle(bundle, **loading)
        pipe.max_batch = at_once
        progress("reading the prompt", 0, 1)
        started = time.monotonic()
        result = pipe(
            request.prompt,
            request.negative_prompt,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            scheduler=request.scheduler,
            approximate=request.approximate,
            aspect_ratio=request.aspect_ratio,
            height=request.height,
            width=request.width,
            callback_on_step_end=None if previews is None else write,
            progress=progress,
            **options,
        )
    return result, time.monotonic() - started


def _facts(
    result: PipelineOutput,
    manifest: Manifest,
    negative: str,
    sampling: SamplingConfig,
    tiled: bool,
) -> list[dict[str, Any]]:
    """What made each image: the PNG's text chunks and the JSON's records."""
    return [
        {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed,
            "steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "scheduler": sampling.scheduler.value,
            "size": f"{image.width}x{image.height}",
            "model": manifest.model["name"],
            "bundle": manifest.key,
            "pixart_rt": __version__,
            **_approximations(sampling, skipped, tiled),
        }
        for image, prompt, seed, skipped in zip(
            result.images, result.prompts, result.seeds, result.skipped_steps, strict=True
        )
    ]


def _approximations(
    sampling: SamplingConfig, skipped: tuple[int, ...], tiled: bool
) -> dict[str, Any]:
    """Why an image is not the exact one; nothing if it is. Steps count from 0."""
    facts: dict[str, Any] = {}
    if sampling.approximate is not None:
        facts = {"approximate": str(sampling.approximate),
                 "skipped_steps": " ".join(str(step) for step in skipped)}  # fmt: skip
    if sampling.guidance_interval[1] < 1:
        facts["guidance_stop"] = sampling.guidance_interval[1]
    if tiled:
        facts["vae_tiling"] = True
    return facts


def _write(
    result: PipelineOutput, facts: list[dict[str, Any]], paths: list[Path], grid: bool, force: bool
) -> list[Path]:
    from pixart_rt.inference.images import contact_sheet, write_png

    images: list[Image] = result.images
    if not grid:
        return [
            write_png(image, path, fact, force=force)
            for image, path, fact in zip(images, paths, facts, strict=True)
        ]
    captions = [f"{fact['prompt']} (seed {fact['seed']})" for fact in facts]
    seeds = " ".join(str(seed) for seed in result.seeds)
    return [write_png(contact_sheet(images, captions), paths[0], facts[0] | {"seed": seeds},
                      force=force)]  # fmt: skip
