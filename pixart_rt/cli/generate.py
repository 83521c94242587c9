"""`pixart-rt generate`: prompts to PNG files, each written as soon as it is made."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixart_rt.approximations import one_approximation
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints.hub import unseen_words
from pixart_rt.cli.console import Steps, note, print_json
from pixart_rt.cli.failures import options_named
from pixart_rt.cli.previews import PreviewWriter, check_previews
from pixart_rt.cli.prompts_file import prompt_lines
from pixart_rt.config import SamplingConfig, Scheduler
from pixart_rt.errors import ConfigError, NumericsError
from pixart_rt.inference.request import DEFAULT_SEED, MOST_IMAGES, Request
from pixart_rt.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart_rt.inference.generation import ImageResult
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
    "force_scheduler": "--force",
}  # the command's word for each argument of the pipeline


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the image shows.", show_default=False),
    ] = None,
    *,
    bundle: Annotated[Path, typer.Option(help="A folder that `pixart-rt build` made.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .png to write; with -n, name-0.png ...")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line; .jsonl: settings for each."),
    ] = None,
    num: Annotated[int, typer.Option("-n", "--num", min=1, help="Images of each prompt.")] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="All images on one captioned sheet.")
    ] = False,
    aspect: Annotated[
        str | None, typer.Option(help="Width:height, such as 3:2; the nearest trained size.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: the bundle's, else 20.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. Default: the bundle's, else 4.5.")
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
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files; take a sampler the weights are not made for."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate images from a prompt, or from a file of prompts.

    Each PNG is written as soon as its batch is made: Ctrl-C keeps those. Its text chunks hold the
    prompt, seed and settings, and the bundle's key.

    \b
    Examples:
      pixart-rt generate "a red circle above a blue square" --bundle engines/tiny-1024 -o out.png
      pixart-rt generate "a small green star" --bundle engines/tiny-1024 -o star.png --aspect 3:2
      pixart-rt generate "a blue star" --bundle engines/tiny-1024 -o sheet.png -n 4 --grid --seed 7
      pixart-rt generate --prompts prompts.txt --bundle engines/tiny-1024 -o images/all.png
    """
    from pixart_rt.inference.images import refuse_existing

    settings: dict[str, Any] = {
        "negative_prompt": negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_interval": None if guidance_stop is None else (0.0, guidance_stop),
        "scheduler": scheduler,
        "force_scheduler": force,
        "approximate": one_approximation(step_cache, first_block_cache),
        "aspect_ratio": aspect,
        "height": height,
        "width": width,
    }
    if prompts is not None and preview is not None:
        raise ConfigError("--preview shows the images of one prompt; leave --prompts or it out")
    requests = _requests(prompt, prompts, num, seed, settings)
    paths = _output_paths(output, len(requests), grid)
    refuse_existing(paths, force=force)
    if prompt_cache is not None and prompt_cache.exists() and not prompt_cache.is_dir():
        raise ConfigError(f"--prompt-cache {prompt_cache} is a file; name a folder")
    manifest = Manifest.read(bundle)
    with options_named(OPTIONS):
        samplings = [request.resolved(manifest).sampling for request in requests]
    _warn_of_words(manifest, requests)
    if preview is not None:
        check_previews(preview, bundle, force=force)
    if (control_image is None) != (manifest.control is None):
        raise ConfigError(
            f"--control-image was {'not ' if control_image is None else ''}given, but {bundle} has "
            f"{'a' if manifest.control else 'no'} ControlNet; "
            + ("name a picture of edges" if manifest.control else "leave it out")
        )
    if control_image is not None:
        picture = _open_picture(control_image)
        requests = [replace(request, control_image=picture) for request in requests]
    writer = None
    if preview is not None:
        writer = PreviewWriter(preview, preview_every, samplings[0].num_inference_steps)
    fit = None if vram is None else _fit(bundle, manifest, vram, vae_tiling)
    tiled = fit.config.vae_tiling if fit else vae_tiling or manifest.vae_tiling
    loading = {
        "prompt_cache": prompt_cache,
        "text_place": fit.config.text_place if fit else None,
        "auto_capture": not no_auto_capture and fit is None,  # a graph's memory is not predicted
    }
    at_once = fit.config.max_batch if fit else int(manifest.engine_config["max_batch"])
    common = {"model": manifest.model["name"], "bundle": manifest.key, "pixart_rt": __version__}
    more = {} if control_image is None else {"control_image": control_image.name}
    images = Images(paths, len(requests), grid, force, common, more, tiled)
    with options_named(OPTIONS):
        seconds = _run(bundle, at_once, loading, requests, tiled, writer, images)
    if as_json:
        print_json({"files": [str(path) for path in images.written], "images": images.facts,
                    "seconds": round(seconds, 3)})  # fmt: skip
    else:
        for path in images.written:
            typer.echo(str(path))
    images.require_all()


def _requests(
    prompt: str | None, file: Path | None, num: int, seed: int, settings: dict[str, Any]
) -> list[Request]:
    """Each prompt's images in a row; image k draws from seed + k unless its line has a seed, from
    which its own are counted then.
    """
    if (prompt is None) == (file is None):
        raise ConfigError(
            f"{'no' if prompt is None else 'both a'} PROMPT and --prompts were given; give one "
            "of the two"
        )
    lines = [] if file is None else list(prompt_lines(file))
    count = num * max(1, len(lines))
    if count > MOST_IMAGES:
        raise ConfigError(f"{count} images were requested (--num {num}); the most is {MOST_IMAGES}")
    if file is None:
        with options_named(OPTIONS):
            first = Request(prompt=prompt, seed=seed, **settings)
            return [replace(first, seed=seed + index) for index in range(num)]
    requests: list[Request] = []
    for number, line in lines:
        try:
            own = line.pop("seed", None)
            whole = {**settings, **line}
            if {"height", "width"} & line.keys():  # the line's shape, in either form, is its own
                whole["aspect_ratio"] = line.get("aspect_ratio")
            elif "aspect_ratio" in line:
                whole["height"] = whole["width"] = None
            start = seed + len(requests) if own is None else own
            first = Request(seed=start, **whole)
            assert first.seed is not None
            requests += [replace(first, seed=first.seed + index) for index in range(num)]
        except ConfigError as error:
            raise ConfigError(f"--prompts {file}, line {number}: {error}") from error
    return requests


def _warn_of_words(manifest: Manifest, requests: list[Request]) -> None:
    text = " ".join(f"{each.prompt} {each.negative_prompt}" for each in requests)
    unseen = unseen_words(str(manifest.model["name"]), text)
    if unseen:
        note(
            f"warning: tiny has never seen {', '.join(unseen[:8])}; it knows coloured circles, "
            "squares, triangles and stars (docs/tiny.md), and draws what it takes this for"
        )


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
    """FILE itself for one image or a sheet, else name-0.png to name-(n-1).png next to it."""
    if output.suffix.lower() != ".png":
        raise ConfigError(
            f"--output {output} was requested; images are PNG, so name it {output}.png"
        )
    if num == 1 or grid:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(num)]


def _run(
    bundle: Path,
    at_once: int,
    loading: dict[str, Any],
    requests: list[Request],
    tiled: bool,
    previews: PreviewWriter | None,
    images: Images,
) -> float:
    """Make the images, `at_once` in a batch; the seconds they took without loading the bundle."""
    with Steps() as progress:
        progress(f"loading {bundle}", 0, 1)
        from pixart_rt.inference.pipeline import PixArtPipeline  # torch: seconds to import

        def write(pipe: PixArtPipeline, step: int, _timestep: Any, tensors: Any) -> None:
            assert previews is not None
            previews(pipe, step, tensors)

        pipe = PixArtPipeline.from_bundle(bundle, **loading)
        pipe.max_batch = at_once
        progress("reading the prompt", 0, 1)
        started = time.monotonic()
        results = pipe.stream(
            requests,
            vae_tiling=tiled,
            callback_on_step_end=None if previews is None else write,
            progress=progress,
        )
        try:
            for result in results:
                images.take(result)
        except KeyboardInterrupt:
            note(images.summary("stopped"))
            raise
        finally:
            images.finish()
    return time.monotonic() - started


class Images:
    """The images of a run as they come: files of their own, or a sheet at the end."""

    def __init__(
        self,
        paths: list[Path],
        num: int,
        grid: bool,
        force: bool,
        common: dict[str, Any],
        more: dict[str, Any],
        tiled: bool,
    ) -> None:
        """common, more: facts of all images, among which stand those of each."""
        self.written: list[Path] = []
        self._paths, self._num, self._grid, self._force = paths, num, grid, force
        self._common, self._more, self._tiled = common, more, tiled
        self._came: dict[int, tuple[Image | None, dict[str, Any]]] = {}
        self._failed: dict[int, ImageResult] = {}

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What made each image that came, in order: PNG text chunks and JSON records."""
        return [fact for _, (_, fact) in sorted(self._came.items())]

    def take(self, result: ImageResult) -> None:
        """Write an image, or keep it for the sheet."""
        from pixart_rt.inference.images import write_png

        if result.error is not None:
            self._failed[result.index] = result
            return
        fact = self._facts(result)
        if not self._grid:
            path = self._paths[result.index]
            self.written.append(write_png(result.image, path, fact, force=self._force))
        kept = result.image if self._grid else None  # a file of its own is enough
        self._came[result.index] = (kept, fact)

    def finish(self) -> None:
        """Write the sheet of the images that came; files in the order of their numbers."""
        from pixart_rt.inference.images import contact_sheet, write_png

        self.written.sort(key=self._paths.index)
        if not self._grid or not self._came:
            return
        images = [image for _, (image, _) in sorted(self._came.items()) if image is not None]
        captions = [f"{fact['prompt']} (seed {fact['seed']})" for fact in self.facts]
        seeds = " ".join(str(fact["seed"]) for fact in self.facts)
        sheet = contact_sheet(images, captions)
        fact = self.facts[0] | {"seed": seeds}
        self.written = [write_png(sheet, self._paths[0], fact, force=self._force)]

    def summary(self, why: str) -> str:
        """How many images came, and which did not."""
        missing = [index for index in range(self._num) if index not in self._came]
        names = [self._name(index) for index in missing]
        rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return (
            f"{why}: {len(self._came)} of {self._num} images are written, not "
            f"{', '.join(names[:8])}{rest}"
        )

    def require_all(self) -> None:
        """Raise NumericsError that names the images that failed."""
        if self._failed:
            first = next(iter(self._failed.values())).error
            raise NumericsError(f"{self.summary('failed')}: {first}")

    def _name(self, index: int) -> str:
        """Of an image that is missing."""
        return f"image {index}" if self._grid else self._paths[index].name

    def _facts(self, result: ImageResult) -> dict[str, Any]:
        request, sampling = result.request, result.sampling
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "scheduler": sampling.scheduler.value,
            "size": f"{result.image.width}x{result.image.height}",
            **self._common,
            **_approximations(sampling, result.skipped_steps, self._tiled),
            **self._more,
        }


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
