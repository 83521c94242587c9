"""`pixart-rt bench`: a bundle's speed, compared with diffusers' and the machine's limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pixart_rt.bench.request import PEERS, PROMPT, BenchRequest
from pixart_rt.bundle import Manifest
from pixart_rt.cli.build import engine_config
from pixart_rt.cli.console import Steps, note, print_json, print_tables
from pixart_rt.config import COMPONENTS, Precision, Quality, Weights
from pixart_rt.errors import ConfigError, NumericsError
from pixart_rt.files import check_file, replacing

_DEFAULT_RES = 1024
_GIB = 2**30
_BUSY = 0.25  # of the cores, by the load average of the last minute


def bench(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="A folder that `pixart-rt build` made.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without DIR: what to build and measure. Default: tiny.")
    ] = None,
    res: Annotated[int | None, typer.Option(help="Of --model: 256, 512 or 1024.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of --model, as for build.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of --model.")] = None,
    aspect: Annotated[str, typer.Option(help="Width:height; the nearest trained size.")] = "1:1",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.5,
    batch: Annotated[
        str, typer.Option(help="Images in a call; a comma list, such as 1,2,4.")
    ] = "1",
    repeats: Annotated[int, typer.Option(help="Measured repetitions of every series.")] = 10,
    warmup: Annotated[
        int | None, typer.Option(help="Unmeasured ones. Default: 1, on a GPU 3.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"Compare with: {', '.join(PEERS)}; repeat it for both."),
    ] = None,
    peer_model: Annotated[
        Path | None,
        typer.Option(help="The peers' weights, a diffusers folder. Default: the bundle's source."),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(help="dB the peers' images must agree by. Default: 40, in 16 bits 20."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="A running number is added to it.")] = PROMPT,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of all systems.")] = None,
    cold: Annotated[bool, typer.Option(help="Also start each system in a fresh process.")] = True,
    plots: Annotated[bool, typer.Option(help="Draw PNGs next to the JSON file.")] = True,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured; - is stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --json.")] = False,
) -> None:
    """Measure latency, stages, throughput and memory.

    Peers run in the same process with the same weights, prompts, noise and threads, in turn with
    ours; their images must agree with ours, else the exit code is 1. The method is in
    docs/performance.md.

    \b
    Examples:
      pixart-rt bench --model tiny --res 256 --peer diffusers
      pixart-rt bench engines/tiny-1024 --steps 20 --batch 1,2,4 --json bench.json
      pixart-rt bench engines/alpha-1024 --peer diffusers --peer diffusers-compile --json bench.json
    """
    draws = plots and out is not None and out != Path("-")
    if out is not None and out != Path("-"):
        check_file(out, force=force)
    if draws:
        from pixart_rt.bench.plots import plot_paths  # a missing matplotlib is said before the work

        assert out is not None
        for path in plot_paths(out.parent, out.stem):
            check_file(path, force=force)
    batches = _batches(batch)
    if bundle is None:
        bundle = _build(model or "tiny", res or _DEFAULT_RES, backend, precision, max(batches))
    else:
        _refuse_build_options(bundle, model, res, backend, precision)
    request = BenchRequest(
        bundle=bundle, prompt=prompt, aspect_ratio=aspect, steps=steps, guidance_scale=guidance,
        seed=seed, batches=batches, repeats=repeats, warmup=warmup, threads=threads,
        peers=tuple(peer or ()), peer_model=peer_model, min_psnr=min_psnr, cold=cold,
    )  # fmt: skip
    with Steps() as progress:
        progress("loading torch", 0, 1)
        from pixart_rt.bench.run import run

        result = run(request, progress=progress)
    _warn_if_busy(result)
    _write(result, out, draws)
    _refuse_different_images(result)


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--batch {text!r} is not supported; it is a comma list such as 1,2,4"
        ) from None


def _build(
    model: str, res: int, backend: str | None, precision: Precision | None, max_batch: int
) -> Path:
    """The bundle of a model for this measurement, built unless it is there."""
    config = engine_config(
        res, backend or "auto", (), precision, None, COMPONENTS, "engine", max_batch, Quality.HIGH,
        False, Weights.FULL, Weights.FULL,
    )  # fmt: skip
    from pixart_rt.export.build import build

    label = Path(model).resolve().name.removesuffix(".pth")
    name = f"bench-{label}-{res}-{config.backend}-{config.precision}-{max_batch}"
    with Steps() as progress:
        return build(model, Path("engines") / name, config, progress=progress).path


def _refuse_build_options(
    bundle: Path,
    model: str | None,
    res: int | None,
    backend: str | None,
    precision: Precision | None,
) -> None:
    given = {"--model": model, "--backend": backend, "--precision": precision}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value} was requested together with the bundle {bundle}, which is built "
                "already; leave one of them out"
            )
    found = int(Manifest.read(bundle).engine_config["resolution"])
    if res not in (None, found):
        raise ConfigError(f"--res {res} was requested, but {bundle} is a bundle for {found} px")


def _write(result: dict[str, Any], out: Path | None, draws: bool) -> None:
    """JSON and plots to their files, then the tables; for `-` the JSON alone."""
    if out == Path("-"):
        print_json(result)
        return
    if out is not None:
        with replacing(out) as new:
            new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        note(f"wrote {out}")
    if out is not None and draws:
        from pixart_rt.bench.plots import write_plots

        for path in write_plots(result, out.parent, out.stem):
            note(f"wrote {path}")
    print_tables(_latencies(result), _systems(result))


def _latencies(result: dict[str, Any]) -> Table:
    """A row per series: seconds at the percentiles, of the stages, and images a second."""
    asked, limits = result["request"], result["roofline"]
    table = _table(
        f"{asked['model']}, {asked['width']}x{asked['height']}, {asked['steps']} steps, "
        f"{asked['repeats']} repetitions, seconds",
        "system", "batch", "p50", "p90", "p99", "text", "steps", "VAE", "rest", "img/s",
    )  # fmt: skip
    for name, system in result["systems"].items():
        for series in system["series"]:
            label = name if series["prompts"] == "new" else f"{name}, cached"
            seconds = [series[f"p{q}_s"] for q in (50, 90, 99)]
            seconds += series["stages_mean_s"].values()
            table.add_row(label, str(series["batch"]), *map(_short, seconds),
                          _short(series["images_per_s"]))  # fmt: skip
    for work, stages in limits["floors"].items():
        known = [stages[name] and stages[name]["seconds"] for name in
                 ("text_encoder", "denoising", "vae_decoder")]  # fmt: skip
        whole = "?" if None in known else _short(sum(known))
        cells = ["?" if value is None else _short(value) for value in known]
        table.add_row(f"floor, {work}", str(limits["batch"]), whole, "", "", *cells, "", "",
                      style="dim")  # fmt: skip
    return table


def _table(title: str, first: str, *others: str) -> Table:
    """Narrow enough for 80 columns: no lines between the columns."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _systems(result: dict[str, Any]) -> Table:
    """A row per system: fresh process, first call, memory; how far peers are from ours."""
    table = _table("each system", "system", "cold s", "first call s", "GiB", "over ours", "PSNR dB")
    for name, system in result["systems"].items():
        cold, memory = system["cold"], "-"
        if cold is not None:
            peak = cold["peak_memory"]
            memory = f"{peak.get('cuda_reserved', peak['process']) / _GIB:.2f}"
        factor, agrees = result["speedup"].get(name), result["agreement"].get(name)
        table.add_row(
            name,
            "-" if cold is None else f"{cold['total_s']:.1f}",
            _short(system["series"][0]["prepare_s"] + system["series"][0]["first_call_s"]),
            memory,
            "" if factor is None else f"{factor['paired']:.2f}x",
            "" if agrees is None else _psnr(agrees),
        )
    return table


def _psnr(agreement: dict[str, Any]) -> str:
    found = "equal" if agreement["psnr_db"] is None else f"{agreement['psnr_db']:.1f}"
    return found if agreement["agrees"] else f"{found}: DIFFERENT"


def _warn_if_busy(result: dict[str, Any]) -> None:
    load, cores = result["load_average_at_start"][0], result["hardware"]["cores"]
    if result["request"]["device"] == "cpu" and load > _BUSY * cores:
        note(
            f"warning: {load:g} of {cores} cores were in use before the measurement began; what "
            "waits for other programs is not this one's speed"
        )


def _refuse_different_images(result: dict[str, Any]) -> None:
    for name, agreement in result["agreement"].items():
        if not agreement["agrees"]:
            unrelated = agreement["unrelated_psnr_db"]
            raise NumericsError(
                f"the images of {name} and ours agree by {_psnr(agreement)} dB only; at least "
                f"{agreement['bound_psnr_db']:g} are needed, and more than the "
                f"{'equality' if unrelated is None else f'{unrelated:.1f}'} of different images of "
                "this run: the comparison is worth nothing; check --peer-model and `pixart-rt "
                "verify`, or set --min-psnr"
            )
