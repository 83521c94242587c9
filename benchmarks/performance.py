"""The tables of docs/performance.md, from what `pixart-rt bench` and gpu/run.sh measured.

    pixart-rt bench --model tiny --res 1024 --peer diffusers --json benchmarks/results/bench-tiny-1024.json
    benchmarks/gpu/run.sh measure benchmarks/results/gpu
    python -m benchmarks.performance

Every benchmarks/results/bench-*.json becomes a table with its origin; measurements on a CPU and on
a GPU have a section each. Every benchmarks/results/gpu/*.json becomes tables and plots, which are
made here: the machine with the GPU needs no matplotlib. A result whose peers drew other images is
refused, and one of gpu/ that was written without a GPU.
"""  # noqa: E501 - commands stay on one line

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu import plots, report
from benchmarks.provenance import RESULTS, ROOT, write_sections

DOC = ROOT / "docs" / "performance.md"
EMPTY = "Not measured yet.\n"
SECTIONS = {"cpu": EMPTY, "cuda": EMPTY}  # marker -> if empty
PLOTS = ("stages", "latency", "throughput", "roofline")
GIB = 2**30


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per series, then floors, then where it comes from."""
    asked, limits = result["request"], result["roofline"]
    lines = [
        f"### {asked['model']}, {asked['width']}×{asked['height']}, {asked['steps']} steps",
        "",
        "| system | batch | p50 s | p90 s | p99 s | text encoder | denoising | one step | "
        "VAE decoder | rest | images/s |",
        "|---" * 11 + "|",
    ]
    for name, system in result["systems"].items():
        for series in system["series"]:
            cached = ", cached prompt" if series["prompts"] == "cached" else ""
            stages, step = series["stages_mean_s"], series["transformer_call_s"]
            seconds = [series[f"p{q}_s"] for q in (50, 90, 99)]
            seconds += [stages["text_encoder"], stages["denoising"]]
            cells = [*map(short, seconds), short(step["p50_s"]) if step else "-",
                     short(stages["vae_decoder"]), short(stages["rest"]),
                     short(series["images_per_s"])]  # fmt: skip
            lines.append(f"| {name}{cached} | {series['batch']} | {' | '.join(cells)} |")
    for work, stages in limits["floors"].items():
        parts = [stages[name] for name in ("text_encoder", "denoising", "vae_decoder")]
        known = ["-" if part is None else short(part["seconds"]) for part in parts]
        whole = "-" if None in parts else short(sum(part["seconds"] for part in parts))
        cells = [whole, "", "", known[0], known[1], "", known[2], "", ""]
        lines.append(f"| floor, {work} work | {limits['batch']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *systems(result), "", origin(result), ""])


def systems(result: dict[str, Any]) -> list[str]:
    """Markdown rows: fresh process, first call, memory, speed-up and agreement."""
    lines = [
        "| system | cold start s | first call s | peak memory GiB | its time over ours | "
        "over ours, cached prompt | PSNR of its images to ours |",
        "|---" * 7 + "|",
    ]
    for name, system in result["systems"].items():
        cold, factor = system["cold"], result["speedup"].get(name)
        agreement = result["agreement"].get(name)
        first = system["series"][0]
        cells = ["-", short(first["prepare_s"] + first["first_call_s"]), "-"]
        if cold is not None:
            peak = cold["peak_memory"]
            cells[0] = short(cold["total_s"])
            cells[2] = f"{peak.get('cuda_reserved', peak['process']) / GIB:.2f}"
        cells += [f"{factor['paired']:.2f}×", f"{factor['cached']:.2f}×"] if factor else ["", ""]
        cells.append("" if agreement is None else psnr(agreement))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def origin(result: dict[str, Any]) -> str:
    """Command, commit, machine and libraries of a table."""
    hardware, versions = result["hardware"], result["versions"]
    asked, limits = result["request"], result["roofline"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores"
    if asked["device"] == "cuda":
        machine = f"{hardware['gpu']}; {machine}"
    backends = ", ".join(sorted(set(result["systems"]["pixart_rt"]["backends"].values())))
    return (
        f"`{result['command']}` at commit `{(result['commit'] or 'none')[:12]}` on "
        f"{result['date']}: {machine}, {asked['threads']} threads, load average before it "
        f"{result['load_average_at_start'][0]}; ours on {backends}; {asked['repeats']} "
        f"repetitions; torch {versions['torch']}, diffusers {versions['diffusers']}. Limits "
        f"measured in the run: copy {limits['copy_tb_per_s']:.3g} TB/s, "
        f"{limits['matmul_dtype']} product {limits['matmul_tflop_per_s']:.3g} TFLOP/s."
    )


def short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def psnr(agreement: dict[str, Any]) -> str:
    return "equal" if agreement["psnr_db"] is None else f"{agreement['psnr_db']:.1f} dB"


def pictures(path: Path, doc: Path) -> str:
    """Links to the plots next to a result, relative to the document."""
    found = [path.with_name(f"{path.stem}-{kind}.png") for kind in PLOTS]
    links = [
        f"![{each.stem}]({Path(os.path.relpath(each, doc.parent)).as_posix()})"
        for each in found
        if each.is_file()
    ]
    return "\n".join([*links, ""]) if links else ""


def sections(paths: list[Path], doc: Path) -> dict[str, str]:
    """The text of each section. Raises SystemExit for a result whose images differ."""
    found: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, agreement in result["agreement"].items():
            if not agreement["agrees"]:
                raise SystemExit(f"error: {path}: {name} drew other images; measure again")
        found[result["request"]["device"]].append(
            "\n".join(filter(None, [table(result), pictures(path, doc)]))
        )
    return {name: "\n".join(tables) or SECTIONS[name] for name, tables in found.items()}


def gpu_section(paths: list[Path], doc: Path) -> str:
    """The tables and plots of the calls of gpu/run.sh, if there are any."""
    blocks = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        text = report.markdown(found)
        drawn = [
            f"![{each.stem}]({Path(os.path.relpath(each, doc.parent)).as_posix()})"
            for each in plots.write_plots(found, path.parent, path.stem)
        ]
        blocks.append("\n".join([text, *drawn, ""]))
    return "\n".join(blocks) or EMPTY


def write(doc: Path, results: Path) -> None:
    """Put the tables of a folder's results between the document's markers."""
    found = sections(sorted(results.glob("bench-*.json")), doc)
    found["gpu"] = gpu_section(sorted((results / "gpu").glob("*.json")), doc)
    write_sections(doc, found)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write(DOC, RESULTS)
    print(DOC)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
