"""From the parts' JSON to one file, the tables, and what was promised beside what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.h200.pool import Result
from benchmarks.provenance import provenance
from pixart_rt.files import replacing

Rows = list[dict[str, Any]]
GUIDED = 2  # rows of a step for one image
PROMPT = 30  # tokens of the prompt whose loop is compared
# What is asked of the DiT step: the compiled peer's time over that of our loop, by pixels.
STEP_BARS = {256: (1.4, 1.65), 512: (1.25, 1.40), 1024: (1.12, 1.33)}  # least, hoped for
TRAINING_BARS = {256: 1.1, 512: 1.1}
MFU_BARS = {256: 0.46, 512: 0.46, 1024: 0.42}
IMAGE_BAR = 0.48  # seconds at 1024 px


def collect(out: Path, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Everything in one dictionary. Rows of parts that were split are joined."""
    parts: dict[str, Rows] = {}
    for result in results:
        path = result.job.output
        if path is not None and path.is_file():  # also of one that failed or was stopped
            parts.setdefault(_section(result.job.part), []).append(json.loads(path.read_text()))
    found: dict[str, Any] = {
        **provenance(),
        "seconds": seconds,
        "jobs": [
            {"name": result.job.name, "state": result.state, "seconds": round(result.seconds, 1),
             "said": "" if result.done else _last_line(out / "parts" / f"{result.job.name}.log")}
            for result in results
        ],
        "limits": next(iter(parts.get("limits", [])), None),
        "steps": _joined(parts.get("steps", []), "rows"),
        "loop": _joined(parts.get("loop", []), "rows"),
        "kernels": _joined(parts.get("kernels", []), "rows"),
        "refused_kernels": _joined(parts.get("kernels", []), "refused_kernels"),
        "training": _joined(parts.get("training", []), "rows"),
        "training_compared": _joined(parts.get("training", []), "compared"),
        "images": parts.get("image", []),
        "tensorrt_rtx": parts.get("rtx", []),
        "profile": _joined(parts.get("profile", []), "kernels"),
    }  # fmt: skip
    found["measured"] = found["hardware"]["gpu"] is not None
    found["bars"] = bars(found)
    return found


def _section(part: str) -> str:
    return "image" if part == "image-compiled" else part


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _joined(parts: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [row for part in parts for row in part[key]]


def write(path: Path, found: dict[str, Any]) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(found, indent=1) + "\n")


def seconds_of(rows: Rows, **wanted: Any) -> float | None:
    """Of the first row with these values that was timed."""
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()) and "seconds" in row:
            return float(row["seconds"])
    return None


def bars(found: dict[str, Any]) -> Rows:
    """Of what was asked: name, least, what was found (None: not measured), whether it is met."""
    rows: Rows = []

    def bar(
        name: str, least: float, value: float | None, *, unit: str, below: bool = False
    ) -> None:
        value = value if found["measured"] else None  # a CPU's times are nobody's promise
        met = None if value is None else (value <= least if below else value >= least)
        rows.append({"name": name, "asked": least, "found": value, "unit": unit, "below": below,
                     "met": met})  # fmt: skip

    for pixels, (least, _) in STEP_BARS.items():
        peer = seconds_of(found["steps"], form="diffusers compiled", pixels=pixels, batch=GUIDED)
        ours = seconds_of(found["loop"], pixels=pixels, images=1, quality="high",
                          prompt_tokens=PROMPT)  # fmt: skip
        value = peer / ours if peer and ours else None
        bar(f"DiT step {pixels} px, compiled diffusers over ours", least, value, unit="x")
    for row in _timed_kernels(found):
        if row["operator"] == "attention_qkv_packed" and row["shape"] == f"{GUIDED}x4096":
            times = {k: v for k, v in row["seconds"].items() if not isinstance(v, str)}
            best = min(v for k, v in times.items() if k.startswith("sdpa"))
            bar("attention 1024 px, best SDPA over ours", 1.0, best / times["ours"], unit="x")
            break
    compared = {row["pixels"]: row for row in found["training_compared"]}
    for pixels, least in TRAINING_BARS.items():
        value = compared.get(pixels, {}).get("speedup")
        bar(f"training step {pixels} px, fastest diffusers over ours", least, value, unit="x")
    for pixels, least in MFU_BARS.items():
        value = compared.get(pixels, {}).get("mfu")
        bar(f"training step {pixels} px, MFU", least, value, unit="")
    image = next((_p50(each) for each in found["images"]), None)
    bar("image 1024 px, 20 steps, p50", IMAGE_BAR, image, unit="s", below=True)
    return rows


def _timed_kernels(found: dict[str, Any]) -> Rows:
    return [row for row in found["kernels"] if "failed" not in row]


def _p50(bench: dict[str, Any]) -> float:
    return float(bench["systems"]["pixart_rt"]["series"][0]["p50_s"])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns of equal width, to be read on a terminal as well."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    made = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines]  # fmt: skip
    return "\n".join([made[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *made[1:]])


def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    return "-" if value is None else f"{scale * value:.{digits}g}"


def bars_table(found: dict[str, Any]) -> str:
    words = {None: "not measured", True: "met", False: "missed"}
    return table(
        ("asked of", "least", "found", ""),
        (
            (row["name"], f"{'≤' if row['below'] else '≥'} {row['asked']:g} {row['unit']}".rstrip(),
             f"{number(row['found'])} {row['unit']}".rstrip() if row["found"] else "-",
             words[row["met"]])
            for row in found["bars"]
        ),
    )  # fmt: skip


def limits_table(found: dict[str, Any]) -> str:
    """TFLOP/s of the products in each dtype; `-` where it was not run."""
    limits = found["limits"]
    if not limits:
        return ""
    sizes: dict[tuple[str, int, int, int], dict[str, float]] = {
        (row["product"], row["m"], row["n"], row["k"]): {} for row in limits["products"]
    }
    for row in limits["products"]:
        sizes[row["product"], row["m"], row["n"], row["k"]][row["dtype"]] = row["tflop_per_s"]
    dtypes = sorted({row["dtype"] for row in limits["products"]})
    return table(
        ("product", "M", "N", "K", *(f"{dtype} TFLOP/s" for dtype in dtypes)),
        ((name, str(m), str(n), str(k), *(number(rates.get(dtype)) for dtype in dtypes))
         for (name, m, n, k), rates in sizes.items()),
    )  # fmt: skip


def steps_table(found: dict[str, Any]) -> str:
    """Milliseconds of a step: forms by pixels and rows; our loops below."""
    rows = found["steps"]
    sizes = sorted({(row["pixels"], row["batch"]) for row in rows})
    forms = list(dict.fromkeys(row["form"] for row in rows))

    def cell(form: str, pixels: int, batch: int) -> str:
        row = next((row for row in rows if (row["form"], row["pixels"], row["batch"])
                    == (form, pixels, batch)), None)  # fmt: skip
        if row is None:
            return "-"
        if "failed" in row:
            return "failed"
        return number(row["seconds"], 1e3) if row["agrees"] else f"wrong ({row['error']:.1e})"

    lines = [[form, *(cell(form, *size) for size in sizes)] for form in forms]
    for quality in dict.fromkeys(row["quality"] for row in found["loop"]):
        cells = [
            number(seconds_of(found["loop"], pixels=pixels, images=batch // GUIDED,
                              quality=quality, prompt_tokens=PROMPT), 1e3)
            for pixels, batch in sizes
        ]  # fmt: skip
        lines.append([f"ours, whole loop in a graph, {quality}", *cells])
    return table(("ms a step", *(f"{p} px, {b} rows" for p, b in sizes)), lines) if lines else ""


def kernels_table(found: dict[str, Any]) -> str:
    """Microseconds, errors against float64 and the rate of ours."""
    lines = []
    for row in _timed_kernels(found):
        if row["with_compiled"] or not row["against_float64"]:
            continue
        again = next((each for each in _timed_kernels(found) if each["with_compiled"]
                      and (each["operator"], each["shape"]) == (row["operator"], row["shape"])),
                     None)  # fmt: skip
        times = {k: v for k, v in row["seconds"].items() if not isinstance(v, str)}
        best = min((v for k, v in times.items() if k.startswith("sdpa")), default=None)
        compiled = again["seconds"].get("compiled") if again else None
        rate = (f"{row['flops'] / times['ours'] / 1e12:.0f} TFLOP/s" if row["flops"]
                else f"{row['bytes'] / times['ours'] / 1e12:.2f} TB/s")  # fmt: skip
        lines.append((row["operator"], row["shape"], number(times["ours"], 1e6), rate,
                      number(times["eager"], 1e6), number(compiled, 1e6), number(best, 1e6),
                      f"{row['errors']['ours']:.1e}", f"{row['errors']['eager']:.1e}"))  # fmt: skip
    head = ("operator", "rows x tokens", "ours µs", "rate", "eager", "compiled", "best SDPA",
            "error of ours", "of eager")  # fmt: skip
    return table(head, lines) if lines else ""


def training_table(found: dict[str, Any]) -> str:
    head = ("px", "form", "images", "ms a step", "MFU %", "GiB", "gradients differ by")
    lines = [
        (
            str(row["pixels"]), row["form"], str(row["batch"]), _training_time(row),
            number(row.get("mfu"), 100), number(row.get("memory_bytes"), 2**-30),
            number(row["difference"], digits=2),
        )
        for row in found["training"]
    ]  # fmt: skip
    return table(head, lines) if lines else ""


def _training_time(row: dict[str, Any]) -> str:
    if "seconds" in row:
        return number(row["seconds"], 1e3)
    if "failed" in row:
        return "failed"
    return "out of memory" if row.get("out_of_memory") else f"wrong in {row['most_different']}"


def images_table(found: dict[str, Any]) -> str:
    lines = []
    for bench in (*found["images"], *found["tensorrt_rtx"]):
        backends = ", ".join(sorted(set(bench["systems"]["pixart_rt"]["backends"].values())))
        for name, system in bench["systems"].items():
            said = f"{name} ({backends})" if name == "pixart_rt" else name
            for series in system["series"]:
                stages = series["stages_mean_s"]
                seconds = [series["p50_s"], series["p90_s"]]
                seconds += [stages[each] for each in ("text_encoder", "denoising", "vae_decoder")]
                lines.append((said, series["prompts"], *map(number, seconds)))
    head = ("system", "prompts", "p50 s", "p90 s", "text encoder", "denoising", "VAE decoder")
    return table(head, lines) if lines else ""


def profile_table(found: dict[str, Any]) -> str:
    """What Nsight Compute says of the heaviest kernels, a line for each of its metrics."""
    launches = found["profile"]
    metrics = list(dict.fromkeys(name for each in launches for name in each["metrics"]))
    lines = [(name, *(each["metrics"].get(name, "-") for each in launches)) for name in metrics]
    return table(("", *(each["kernel"] for each in launches)), lines) if lines else ""


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "Asked and found": bars_table,
    "One step": steps_table,
    "Kernels": kernels_table,
    "Heaviest kernels": profile_table,
    "Training step": training_table,
    "An image": images_table,
    "The card's own products": limits_table,
}


def text(found: dict[str, Any]) -> str:
    """All tables, the most asked last, where a terminal ends; jobs that did not end well first."""
    blocks = [f"\n## {name}\n\n{body}" for name, make in reversed(TABLES.items())
              if (body := make(found))]  # fmt: skip
    wrong = _not_done(found)
    said = "" if found["measured"] else "No GPU: these are a CPU's times, to try the script.\n"
    return "\n".join([*blocks, "", *wrong, f"{said}{found['seconds']:.0f} s in all"])


def _not_done(found: dict[str, Any]) -> list[str]:
    """Jobs that did not end well, and rows that failed in others."""
    rows = [row for name in ("steps", "loop", "kernels", "training") for row in found[name]]
    said = ("form", "operator", "pixels", "shape", "batch", "images", "quality")
    failed = [
        f"{' '.join(str(row[key]) for key in said if key in row)}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return failed + [
        f"{job['name']}: {job['state']}" + (f" ({job['said']})" if job["said"] else "")
        for job in found["jobs"]
        if job["state"] != "done"
    ]


def markdown(found: dict[str, Any]) -> str:
    """The section of docs/performance.md. Raises SystemExit for a run without a GPU."""
    if not found["measured"]:
        raise SystemExit("error: this h200.json was written without a GPU; measure on one")
    hardware, versions = found["hardware"], found["versions"]
    origin = (
        f"`{found['command']}` at commit `{(found['commit'] or 'none')[:12]}` on {found['date']}: "
        f"{hardware['gpu']}, torch {versions['torch']}, triton {versions['triton']}, diffusers "
        f"{versions['diffusers']}."
    )
    limits = found["limits"]["ceilings"] if found["limits"] else {}
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in limits.items())
    blocks = [f"### {name}\n\n{body}\n" for name, make in TABLES.items() if (body := make(found))]
    wrong = [f"- {line}" for line in _not_done(found)]
    failed = ["Not measured, or not right:\n", *wrong, ""] if wrong else []
    return "\n".join([origin, "", f"Limits: {measured}.", "", *blocks, *failed])
