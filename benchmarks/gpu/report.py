"""From the parts' JSON to one file, the tables, and what was promised compared with what was found.

No number without its truth: a bar whose row is missing, wrong, or ran without one of our kernels is
not met, whatever else was timed, and says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.pool import Job, Result
from pixart_rt.bench.provenance import provenance
from pixart_rt.files import replacing

Rows = list[dict[str, Any]]
GUIDED = 2  # rows of a step for one image
PROMPT = 30  # tokens of the prompt whose loop is compared
# What is asked of the DiT step: the compiled peer's time over that of our loop, by pixels.
STEP_BARS = {256: (1.4, 1.65), 512: (1.25, 1.40), 1024: (1.12, 1.33)}  # least, hoped for
TRAINING_BARS = {256: 1.1, 512: 1.1}
MFU_BARS = {256: 0.46, 512: 0.46, 1024: 0.42}
IMAGE_BAR = 0.48  # seconds at 1024 px
SECTIONS = ("checks", "steps", "loop", "kernels", "training", "tune")
SECTION_OF = {"right": "checks", "image-compiled": "image"}  # a part's, if not its name
SAID = ("check", "form", "operator", "subject", "dtype", "pixels", "shape", "batch", "images",
        "quality")  # fmt: skip


def card() -> str:
    """This GPU in a file's name."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def origin(call: str) -> dict[str, Any]:
    """Where a call's numbers come from, with what only a GPU has."""
    facts = {"call": call, **provenance()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["hardware"] |= {
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(0)),
        }
    return facts


def collect(
    parts: Path, jobs: Sequence[Job], results: Sequence[Result], seconds: float,
    base: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything so far in one dictionary. Rows of parts that were split are joined."""
    ended = {result.job.name: result for result in results}
    written: dict[str, Rows] = {}
    for job in jobs:
        if job.output is not None and job.output.is_file():  # also of one that was stopped
            for section in _sections(job):
                written.setdefault(section, []).append(
                    json.loads(job.output.read_text(encoding="utf-8"))
                )
    found: dict[str, Any] = {
        **base,
        "seconds": round(seconds, 1),
        "jobs": [_job(job, ended.get(job.name), parts) for job in jobs],
        **{name: _joined(written.get(name, []), "rows") for name in SECTIONS},
        "not_run": [row for several in written.values() for row in _left_out(several)],
        "limits": next(iter(written.get("limits", [])), None),
        "images": written.get("image", []),
        "training_compared": _joined(written.get("training", []), "compared"),
        "tuned": next((each["table"] for each in written.get("tune", [])), {}),
        "profile": _joined(written.get("profile", []), "kernels"),
    }
    found["refused_kernels"] = sorted({
        line for name in SECTIONS for row in found[name] for line in row.get("refused_kernels", [])
    } | {line for each in written.get("checks", []) for line in each.get("refused_kernels", [])}
    )  # fmt: skip
    found["measured"] = found["hardware"]["gpu"] is not None
    found["bars"] = bars(found) if found["call"] == "measure" else []
    return found


def _sections(job: Job) -> tuple[str, ...]:
    if job.part == "fp8":
        return ("loop",) if job.name.startswith("loop") else ("steps",)
    return (SECTION_OF.get(job.part, job.part),)


def _job(job: Job, result: Result | None, parts: Path) -> dict[str, Any]:
    state = "not ended" if result is None else result.state
    said = "" if result is not None and result.well else _last_line(parts / f"{job.name}.log")
    seconds = 0.0 if result is None else round(result.seconds, 1)
    return {"name": job.name, "state": state, "seconds": seconds, "said": said,
            "cannot": job.cannot}  # fmt: skip


def _left_out(several: Rows) -> Iterator[dict[str, Any]]:
    """Rows that a benchmark did not run, each with the reason."""
    for each in several:
        yield from each.get("not_run", [])
    for each in several:
        for row in each.get("rows", []):
            if "not_run" in row:
                yield row | {"because": row["not_run"]}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace", encoding="utf-8").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _joined(parts: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [row for part in parts for row in part.get(key, [])]


def write(path: Path, found: dict[str, Any]) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def row_of(rows: Rows, **wanted: Any) -> dict[str, Any]:
    """The first row with these values; {} if there is none."""
    return next((row for row in rows
                 if all(row.get(key) == value for key, value in wanted.items())), {})  # fmt: skip


def seconds_of(rows: Rows, **wanted: Any) -> float | None:
    """Of the row with these values, if it was timed."""
    found = row_of(rows, **wanted).get("seconds")
    return None if found is None else float(found)


def problem(row: dict[str, Any], what: str, *kernels: str) -> str:
    """Why a row cannot stand for what was requested; "" if it can. With `kernels`, a refusal of one
    whose name begins so is a reason, without, that of any.
    """
    if not row:
        return f"{what}: no row"
    if row.get("out_of_memory"):
        return f"{what}: out of memory"
    if "failed" in row:
        return f"{what}: {row['failed']}"
    if not row.get("agrees", True):
        return f"{what}: differs from its reference"
    if "seconds" not in row:
        return f"{what}: not timed"
    gone = [line for line in row.get("refused_kernels", [])
            if line.startswith(kernels or ("",))]  # fmt: skip
    return f"{what}: ran without the kernel {gone[0]}" if gone else ""


def bars(found: dict[str, Any]) -> Rows:
    """Of each bar: name, least, what was found, whether it is met (None: no GPU), and why it is not
    where that is no number's fault.
    """
    rows: Rows = []

    def bar(
        name: str, least: float, value: float | None, why: Sequence[str], *, unit: str = "",
        below: bool = False,
    ) -> None:  # fmt: skip
        reasons = [each for each in why if each]
        reached = value is not None and (value <= least if below else value >= least)
        met = (reached and not reasons) if found["measured"] else None
        rows.append({"name": name, "asked": least, "unit": unit, "below": below, "met": met,
                     "found": value if found["measured"] else None,
                     "why": "; ".join(reasons)})  # fmt: skip

    for pixels, (least, _) in STEP_BARS.items():
        peer = row_of(found["steps"], form="diffusers compiled", pixels=pixels, batch=GUIDED)
        ours = row_of(found["loop"], pixels=pixels, images=1, quality="high",
                      prompt_tokens=PROMPT)  # fmt: skip
        bar(f"DiT step {pixels} px, compiled diffusers over ours", least,
            _over(peer.get("seconds"), ours.get("seconds")),
            [problem(peer | {"refused_kernels": []} if peer else peer, "diffusers compiled"),
             problem(ours, "our loop")], unit="x")  # fmt: skip
    row = row_of(found["kernels"], operator="attention_qkv_packed", shape=f"{GUIDED}x4096",
                 with_compiled=False)  # fmt: skip
    times = _times(row)
    others = [value for name, value in times.items() if name not in ("ours", "eager")]
    bar("attention 1024 px, best other kernel over ours", 1.0,
        _over(min(others, default=None), times.get("ours")),
        [problem(row, "attention", "attention"), "" if others else "no other kernel was timed"],
        unit="x")  # fmt: skip
    for pixels, least in TRAINING_BARS.items():
        pair = row_of(found["training_compared"], pixels=pixels)
        bar(f"training step {pixels} px, fastest diffusers over ours", least,
            pair.get("speedup"), _training_problems(found, pixels, pair), unit="x")  # fmt: skip
    for pixels, least in MFU_BARS.items():
        pair = row_of(found["training_compared"], pixels=pixels)
        ours = row_of(found["training"], pixels=pixels, form=pair.get("ours"))
        bar(f"training step {pixels} px, MFU", least, pair.get("mfu"),
            [problem(ours, "our step")])  # fmt: skip
    bench = next(iter(found["images"]), None)
    why = [] if bench else ["no image"]
    if bench is not None:
        why += [f"{peer} draws other images" for peer, each in bench["agreement"].items()
                if not each["agrees"]]  # fmt: skip
        gone = bench["systems"]["pixart_rt"].get("refused_kernels", [])
        why += [f"ran without the kernel {gone[0]}"] if gone else []
    bar("image 1024 px, 20 steps, p50", IMAGE_BAR, _p50(bench) if bench else None, why,
        unit="s", below=True)  # fmt: skip
    return rows


def _training_problems(found: dict[str, Any], pixels: int, pair: dict[str, Any]) -> list[str]:
    """Of every form that was to be run at this size: a peer not timed may have been the fastest."""
    rows = [row for row in found["training"] if row["pixels"] == pixels]
    theirs = [row | {"refused_kernels": []} for row in rows if row["form"].startswith("diffusers")]
    ours = row_of(rows, form=pair.get("ours"))
    return [
        *(problem(row, row.get("form", "diffusers")) for row in theirs or [dict[str, Any]()]),
        problem(ours, "our step"),
    ]


def _over(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def _times(row: dict[str, Any]) -> dict[str, float]:
    """The forms of a kernel's row that were timed."""
    return {k: v for k, v in row.get("seconds", {}).items() if not isinstance(v, str)}


def _p50(bench: dict[str, Any]) -> float:
    return float(bench["systems"]["pixart_rt"]["series"][0]["p50_s"])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns of equal width, to be read on a terminal as well."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    made = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines]  # fmt: skip
    return "\n".join([made[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *made[1:]])


def number(value: float | str | None, scale: float = 1.0, digits: int = 3) -> str:
    """ "-" where there is none, "no" where a reason stands in its place."""
    if value is None or isinstance(value, str):
        return "-" if value is None else "no"
    return f"{scale * value:.{digits}g}"


def bars_table(found: dict[str, Any]) -> str:
    words = {None: "not measured", True: "met", False: "NOT MET"}
    return table(
        ("asked of", "least", "found", "", "why"),
        (
            (row["name"], f"{'≤' if row['below'] else '≥'} {row['asked']:g} {row['unit']}".rstrip(),
             f"{number(row['found'])} {row['unit']}".rstrip() if row["found"] else "-",
             words[row["met"]], row["why"])
            for row in found["bars"]
        ),
    ) if found["bars"] else ""  # fmt: skip


def checks_table(found: dict[str, Any]) -> str:
    """The worst error of each operator, and what was wrong."""
    lines = []
    for row in found["checks"]:
        if "not_run" in row:
            continue
        verdict = "right" if row["agrees"] else row.get("failed", "WRONG")
        lines.append((row["subject"], row["dtype"], str(row.get("shape", row.get("pixels", ""))),
                      number(row.get("error"), digits=2), number(row.get("allowed"), digits=2),
                      verdict))  # fmt: skip
    head = ("subject", "dtype", "shape", "error", "allowed", "")
    return table(head, lines) if lines else ""


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
        if not row["agrees"]:
            return f"wrong ({row['error']:.1e})"
        return number(row["seconds"], 1e3) + _mark(row)

    lines = [[form, *(cell(form, *size) for size in sizes)] for form in forms]
    for quality in dict.fromkeys(row["quality"] for row in found["loop"]):
        looped = [
            row_of(found["loop"], pixels=pixels, images=batch // GUIDED, quality=quality,
                   prompt_tokens=PROMPT) for pixels, batch in sizes
        ]  # fmt: skip
        cells = [number(row.get("seconds"), 1e3) + _mark(row) for row in looped]
        lines.append([f"ours, whole loop in a graph, {quality}", *cells])
    return table(("ms a step", *(f"{p} px, {b} rows" for p, b in sizes)), lines) if lines else ""


def _mark(row: dict[str, Any]) -> str:
    """A star on what ran without some of our kernels."""
    return "*" if row.get("refused_kernels") and "diffusers" not in row.get("form", "") else ""


def kernels_table(found: dict[str, Any]) -> str:
    """Microseconds, errors against float64 and the rate of ours; "no" for what did not run."""
    lines = []
    for row in found["kernels"]:
        if row["with_compiled"] or "errors" not in row or not row["against_float64"]:
            continue
        key = {"operator": row["operator"], "shape": row["shape"]}
        times = _times(row)
        compiled = row_of(found["kernels"], with_compiled=True, **key).get("seconds", {})
        others = {k: v for k, v in times.items() if k not in ("ours", "eager")}
        best = min(others, key=lambda name: others[name], default=None)
        ours, rate = times.get("ours"), "-"
        if ours:
            rate = (f"{row['flops'] / ours / 1e12:.0f} TFLOP/s" if row["flops"]
                    else f"{row['bytes'] / ours / 1e12:.2f} TB/s")  # fmt: skip
        refused = any(line.startswith(row["operator"].split()[0].split(",")[0] + " in ")
                      for line in row.get("refused_kernels", []))  # fmt: skip
        lines.append((row["operator"], row["shape"], number(ours, 1e6) + "*" * refused, rate,
                      number(times.get("eager"), 1e6), number(compiled.get("compiled"), 1e6),
                      f"{number(others[best], 1e6)} {best}" if best else "-",
                      f"{row['errors']['ours']:.1e}", f"{row['errors']['eager']:.1e}"))  # fmt: skip
    head = ("operator", "rows x tokens", "ours µs", "rate", "eager", "compiled", "best other",
            "error of ours", "of eager")  # fmt: skip
    return table(head, lines) if lines else ""


def training_table(found: dict[str, Any]) -> str:
    head = (
        "px",
        "form",
        "images",
        "ms a step",
        "MFU %",
        "GiB",
        "gradients differ by",
        "in 16 bits",
    )
    lines = [
        (
            str(row["pixels"]), row["form"], str(row["batch"]), _training_time(row) + _mark(row),
            number(row.get("mfu"), 100), number(row.get("memory_bytes"), 2**-30),
            number(row["difference"], digits=2), number(row.get("half_difference"), digits=2),
        )
        for row in found["training"]
    ]  # fmt: skip
    return table(head, lines) if lines else ""


def _training_time(row: dict[str, Any]) -> str:
    if "seconds" in row:
        return number(row["seconds"], 1e3)
    if row.get("out_of_memory"):
        return "out of memory"
    if "failed" in row:
        return "failed"
    return f"wrong in {row.get('half_most_different', row['most_different'])}"


def images_table(found: dict[str, Any]) -> str:
    lines = []
    for bench in found["images"]:
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


def tuned_table(found: dict[str, Any]) -> str:
    lines = [
        (name, json.dumps(entries))
        for kind in ("operators", "choices")
        for name, entries in found["tuned"].get(kind, {}).items()
    ]
    left = found["tuned"].get("not_tried", [])
    lines += [("not tried for time", ", ".join(left))] if left else []
    return table(("operator", "fastest configurations and implementations"), lines) if lines else ""


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "Asked and found": bars_table,
    "One step": steps_table,
    "Kernels": kernels_table,
    "Training step": training_table,
    "An image": images_table,
    "Right or wrong": checks_table,
    "The card's own products": limits_table,
    "Heaviest kernels": profile_table,
    "Tuned": tuned_table,
}


def text(found: dict[str, Any]) -> str:
    """All tables, the most asked last, where a terminal ends; what did not end well before it."""
    blocks = [f"\n## {name}\n\n{body}" for name, make in reversed(TABLES.items())
              if (body := make(found))]  # fmt: skip
    ceilings = _ceilings(found)
    said = "" if found["measured"] else "No GPU: these are a CPU's times, to try the script.\n"
    end = f"{said}{found['hardware']['gpu'] or 'CPU'}, {found['seconds']:.0f} s in all"
    return "\n".join([*blocks, "", ceilings, *not_well(found), end])


def _ceilings(found: dict[str, Any]) -> str:
    limits = found["limits"]["ceilings"] if found["limits"] else {}
    measured = (f"{name.replace('_', ' ')} {value:.3g}" for name, value in limits.items())
    return f"Limits: {', '.join(measured) or 'not measured'}."


def not_well(found: dict[str, Any]) -> list[str]:
    """Refused kernels; rows that failed, were wrong or not run; jobs that did not end well."""
    lines = [f"refused kernel: {line}" for line in found["refused_kernels"]]
    for name in SECTIONS:
        for row in found[name]:
            if not row.get("agrees", True):
                lines.append(f"{_named(row)}: {row.get('failed', 'wrong, or its peer was')}")
    lines += [f"{_named(row)}: not run: {row['because']}" for row in found["not_run"]]
    return lines + [
        f"{job['name']}: {job['state']}" + (f" ({job['said']})" if job["said"] else "")
        for job in found["jobs"]
        if job["state"] != "done"
    ]


def _named(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in SAID if key in row)


def markdown(found: dict[str, Any]) -> str:
    """A call's part of docs/performance.md. Raises SystemExit for a run without a GPU."""
    if not found["measured"]:
        raise SystemExit("error: a result was written without a GPU; measure on one")
    hardware, versions = found["hardware"], found["versions"]
    origin = (
        f"`{found['command']}` at commit `{(found['commit'] or 'none')[:12]}` on {found['date']}: "
        f"{hardware['gpu']}, torch {versions['torch']}, triton {versions['triton']}, diffusers "
        f"{versions['diffusers']}."
    )
    blocks = [f"### {name}\n\n{body}\n" for name, make in TABLES.items() if (body := make(found))]
    wrong = [f"- {line}" for line in not_well(found)]
    failed = ["Not measured, or not right; a star marks what ran without some of our kernels:\n",
              *wrong, ""] if wrong else []  # fmt: skip
    return "\n".join([origin, "", _ceilings(found), "", *blocks, *failed])
