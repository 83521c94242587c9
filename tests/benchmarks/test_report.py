"""What a run on a GPU tells: bars, tables, plots; and that one without a GPU is no measurement."""

from __future__ import annotations

import copy
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Module = Callable[[str], ModuleType]


def step(form: str, pixels: int, seconds: float | None, batch: int = 2) -> dict[str, Any]:
    row = {"form": form, "pixels": pixels, "batch": batch, "error": 0.01, "agrees": True}
    return row | ({} if seconds is None else {"seconds": seconds})


def kernel(operator: str, seconds: dict[str, Any], compiled: bool) -> dict[str, Any]:
    return {"operator": operator, "shape": "2x4096", "with_compiled": compiled, "bytes": 10**8,
            "agrees": True, "refused_kernels": [],
            "errors": {"ours": 1e-3, "eager": 2e-3}, "against_float64": True, "flops": 1e11,
            "seconds": seconds}  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    """As `report.collect` makes it, of a run on a GPU that missed one bar and met one of each."""
    loop = {"pixels": 256, "images": 1, "quality": "high", "prompt_tokens": 30, "agrees": True}
    stages = {"text_encoder": 0.01, "denoising": 0.4, "vae_decoder": 0.03}
    series = [{"prompts": "new", "p50_s": 0.45, "p90_s": 0.46, "stages_mean_s": stages}]
    ours = {"backends": {"transformer": "torch"}, "series": series}
    bench = {"agreement": {}, "systems": {"pixart_rt": ours}}
    training = {"form": "ours compiled", "pixels": 256, "batch": 128, "difference": 1e-6,
                "agrees": True, "half_difference": 0.011,
                "most_different": "loss", "mfu": 0.4, "memory_bytes": 2**34}  # fmt: skip
    return {
        "date": "2030-01-01", "commit": "abc", "command": "benchmarks/gpu/run.sh measure",
        "versions": {"torch": "t", "triton": "r", "diffusers": "d"},
        "hardware": {"gpu": "a GPU"}, "measured": True, "seconds": 500.0,
        "call": "measure", "checks": [], "tune": [], "tuned": {}, "not_run": [],
        "jobs": [{"name": "tune", "state": "failed with exit code 1", "seconds": 3, "said": "why"}],
        "limits": {
            "ceilings": {"copy_tb_per_s": 4.3},
            "products": [
                {"product": "qkv", "m": m, "n": 3456, "k": 1152, "dtype": dtype, "seconds": 1e-3,
                 "tflop_per_s": 600.0}
                for m in (512, 2048) for dtype in ("bfloat16", "float8_e4m3fn")
            ],
            "attention": [
                {"backend": "flash", "head_dim": d, "tokens": 4096, "batch": 2, "seconds": 1e-3,
                 "forward_backward_seconds": 4e-3, "tflop_per_s": 300.0}
                for d in (64, 72)
            ] + [{"backend": "cudnn", "head_dim": 72, "tokens": 4096, "batch": 2, "refused": "no"}],
        },
        "steps": [step("diffusers compiled", 256, 3e-3), step("ours fused", 256, 2e-3),
                  step("diffusers compiled", 512, None) | {"agrees": False, "error": 0.7},
                  {"form": "ours fused", "pixels": 512, "batch": 2, "agrees": False,
                   "error": None, "failed": "RuntimeError: no"}],
        "loop": [loop | {"seconds": 2e-3}],
        "kernels": [
            kernel("attention_qkv_packed",
                   {"ours": 1e-3, "eager": 5e-3, "sdpa flash": 0.9e-3, "sdpa cudnn": "refused: no"},
                   False),
            kernel("attention_qkv_packed", {"ours": 1e-3, "eager": 5e-3, "compiled": 2e-3}, True),
        ],
        "refused_kernels": [],
        "training": [training | {"seconds": 0.2},
                     training | {"form": "diffusers compiled", "seconds": 0.24},
                     training | {"form": "diffusers", "pixels": 512, "out_of_memory": True}],
        "training_compared": [{"pixels": 256, "ours": "ours compiled", "peer": "diffusers compiled",
                               "speedup": 1.2, "mfu": 0.4}],
        "images": [bench],
        "profile": [{"kernel": "k", "metrics": {"Duration (us)": "12"}}],
    }  # fmt: skip


def with_bars(report: ModuleType, found: dict[str, Any]) -> dict[str, Any]:
    return found | {"bars": report.bars(found)}


def bar(report: ModuleType, found: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in report.bars(found) if row["name"].startswith(name)]
    return dict(row)


def test_bars_are_met_or_not(benchmark_module: Module, found: dict[str, Any]) -> None:
    report = benchmark_module("gpu.report")
    step = bar(report, found, "DiT step 256")
    assert step["found"] == pytest.approx(1.5) and step["met"] is True and step["why"] == ""
    attention = bar(report, found, "attention")
    assert attention["found"] == pytest.approx(0.9) and attention["met"] is False
    assert bar(report, found, "training step 256 px, fastest")["met"] is True
    assert bar(report, found, "training step 256 px, MFU")["met"] is False
    assert bar(report, found, "image")["met"] is True, "less is better here"
    found["images"][0]["systems"]["pixart_rt"]["series"][0]["p50_s"] = 0.5
    assert bar(report, found, "image")["met"] is False
    unmeasured = report.bars(found | {"measured": False})
    assert {(row["met"], row["found"]) for row in unmeasured} == {(None, None)}


@pytest.mark.parametrize(
    ("name", "break_it", "why"),
    [
        ("DiT step 512", lambda found: None, "diffusers compiled: differs from its reference"),
        ("DiT step 512", lambda found: None, "our loop: no row"),
        ("DiT step 1024", lambda found: None, "diffusers compiled: no row"),
        ("DiT step 256", lambda found: found["loop"][0].update(refused_kernels=["linear_gelu: x"]),
         "our loop: ran without the kernel linear_gelu: x"),
        ("DiT step 256", lambda found: found["loop"][0].update(failed="OutOfResources: shared"),
         "our loop: OutOfResources: shared"),
        ("attention", lambda found: found["kernels"][0].update(
            refused_kernels=["attention_qkv_packed: 3 times"]), "attention_qkv_packed: 3 times"),
        ("attention", lambda found: found["kernels"].clear(), "no row"),
        ("attention", lambda found: found["kernels"][0]["seconds"].pop("sdpa flash"),
         "no other kernel was timed"),
        ("training step 256 px, fastest",
         lambda found: found["training"][0].update(refused_kernels=["attention_qkv_packed: 2"]),
         "our step: ran without the kernel attention"),
        ("training step 256 px, fastest",
         lambda found: found["training"].append(found["training"][1] | {"failed": "X: y"}),
         "diffusers compiled: X: y"),
        ("training step 512 px, fastest", lambda found: None, "diffusers: out of memory"),
        ("training step 256 px, MFU", lambda found: found["training"].clear(), "no row"),
        ("image", lambda found: found["images"].clear(), "no image"),
        ("image", lambda found: found["images"][0].update(
            agreement={"diffusers": {"agrees": False}}), "diffusers draws other images"),
        ("image", lambda found: found["images"][0]["systems"]["pixart_rt"].update(
            refused_kernels=["ln_modulate: x"]), "ran without the kernel ln_modulate"),
    ],
)  # fmt: skip
def test_a_bar_without_its_truth_is_not_met(
    benchmark_module: Module, found: dict[str, Any], name: str,
    break_it: Callable[[dict[str, Any]], Any], why: str,
) -> None:  # fmt: skip
    report = benchmark_module("gpu.report")
    break_it(found)
    row = bar(report, found, name)
    assert row["met"] is False and why in row["why"]
    page = report.text(with_bars(report, found))
    assert "NOT MET" in page and why in page


def test_other_kernels_refusals_leave_attentions_bar_alone(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("gpu.report")
    found["kernels"][0] |= {"refused_kernels": ["linear_gelu: x"]}
    found["kernels"][0]["seconds"]["ours"] = 0.5e-3
    assert bar(report, found, "attention")["met"] is True


def test_peers_and_kernels_that_failed_do_not_break_the_tables(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    """A compiled peer that failed is text where a number stands; a failed kernel has no times."""
    report = benchmark_module("gpu.report")
    found["kernels"][1]["seconds"]["compiled"] = "InductorError: no"
    row = kernel("linear_gelu", {}, False)
    found["kernels"] += [
        {key: row[key] for key in ("operator", "shape", "with_compiled")}
        | {"failed": "OutOfResources: out of resource: shared memory", "agrees": False},
        {key: value for key, value in kernel("solver", {}, False).items() if key != "seconds"}
        | {"agrees": False},
    ]
    page = report.text(with_bars(report, found))
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
            for line in page.splitlines() if line.startswith("|")}  # fmt: skip
    assert rows["attention_qkv_packed"][4] == "no"
    assert "linear_gelu 2x4096: OutOfResources: out of resource" in page
    assert rows["solver"][1] == "-"


def test_the_page_says_what_was_found_and_what_went_wrong(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("gpu.report")
    for page in (report.markdown(with_bars(report, found)), report.text(with_bars(report, found))):
        assert "tune: failed with exit code 1 (why)" in page
        rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
                for line in page.splitlines() if line.startswith("|")}  # fmt: skip
        assert rows["diffusers compiled"] == ["3", "wrong (7.0e-01)"]
        assert rows["ours fused"] == ["2", "failed"] and "RuntimeError: no" in page
        assert rows["ours, whole loop in a graph, high"] == ["2", "-"]
        assert rows["attention_qkv_packed"][1:7] == [
            "1e+03", "100 TFLOP/s", "5e+03", "2e+03", "900 sdpa flash", "1.0e-03"
        ]  # fmt: skip
        name = "attention 1024 px, best other kernel over ours"
        assert rows[name] == ["≥ 1 x", "0.9 x", "NOT MET", ""]
        assert "out of memory" in page and "Duration (us)" in page


def test_a_run_without_a_gpu_is_no_measurement(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("gpu.report")
    found = with_bars(report, found) | {"measured": False}
    assert "No GPU" in report.text(found)
    with pytest.raises(SystemExit, match="without a GPU"):
        report.markdown(found)


def test_every_part_that_ran_has_its_picture(
    benchmark_module: Module, found: dict[str, Any], tmp_path: Path
) -> None:
    plots = benchmark_module("gpu.plots")
    names = {path.stem for path in plots.write_plots(found, tmp_path, "card")}
    assert names == {f"card-{name}" for name in plots.PLOTS}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    nothing = copy.deepcopy(found) | {"steps": [], "limits": None, "kernels": [], "training": []}
    (tmp_path / "none").mkdir()
    assert plots.write_plots(nothing, tmp_path / "none", "card") == []


def test_results_of_parts_are_joined(benchmark_module: Module, tmp_path: Path) -> None:
    """Also those of a job that was stopped, and of one that still runs."""
    pool, report = benchmark_module("gpu.pool"), benchmark_module("gpu.report")
    results, jobs = [], []
    for k, state in enumerate(("done", "stopped: took over 5 s", None, "not started: no time")):
        output = tmp_path / f"{k}.json"
        if k < 3:
            rows = [step("diffusers", 256, k + 1.0) | {"refused_kernels": [f"a: {k}"] * (k == 1)}]
            left = [{"form": "ours", "because": "time"}] * (k == 1)
            output.write_text(json.dumps({"rows": rows, "not_run": left}))
        jobs.append(pool.Job(name=str(k), part="steps", command=(), output=output))
        if state is not None:
            results.append(pool.Result(job=jobs[k], state=state))
    (tmp_path / "1.log").write_text("Traceback\nValueError: that\n\n")
    base = {"call": "measure", "hardware": {"gpu": None}}
    found = report.collect(tmp_path, jobs, results, 1.0, base)
    assert [row["seconds"] for row in found["steps"]] == [1.0, 2.0, 3.0]
    assert found["jobs"][1]["said"] == "ValueError: that" and found["jobs"][0]["said"] == ""
    assert found["jobs"][2]["state"] == "not ended"
    assert found["refused_kernels"] == ["a: 1"]
    assert found["not_run"] == [{"form": "ours", "because": "time"}]
    assert all(row["met"] is None for row in found["bars"]) and found["limits"] is None
    told = report.not_well(found)
    assert "ours: not run: time" in told and "refused kernel: a: 1" in told


def test_what_was_measured_survives(
    benchmark_module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most two files, from the start on, also where the report itself fails."""
    pack = benchmark_module("gpu.pack")
    parts, out = tmp_path / "parts", tmp_path / "out"
    parts.mkdir(), out.mkdir()
    (parts / "a.json").write_text("{}")
    (parts / "a.log").write_text("x" * (pack.LARGEST_FILE + 5) + "end")
    found: dict[str, Any] = {"rows": [1]}

    def collect() -> dict[str, Any]:
        if not found:
            raise KeyError("form")
        return found

    monkeypatch.setattr(pack, "EVERY", 0.05)
    with pack.Packer(collect, parts, out, "check-card"):
        assert json.loads((out / "check-card.json").read_text()) == {"rows": [1]}
        found["rows"] = [1, 2]
        for _ in range(200):
            if json.loads((out / "check-card.json").read_text()) == {"rows": [1, 2]}:
                break
            time.sleep(0.05)
        else:
            pytest.fail("not written again while it runs")
        (parts / "b.json").write_text("{}")
        found.clear()
    assert sorted(path.name for path in out.iterdir()) == ["check-card.json", "check-card.tar.gz"]
    said = json.loads((out / "check-card.json").read_text())
    assert said == {"report_failed": "KeyError: 'form'"}
    with tarfile.open(out / "check-card.tar.gz") as archive:
        assert archive.getnames() == ["a.json", "a.log", "b.json"]
        log = archive.extractfile("a.log")
        assert log is not None and log.read().endswith(b"xend")
        assert archive.getmember("a.log").size == pack.LARGEST_FILE


def test_ncus_rows_are_joined_by_launch(benchmark_module: Module) -> None:
    said = (
        "==PROF== Connected to process 1\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","a_kernel(int, float)","GPU Speed Of Light","Duration","us","12.5"\n'
        '"0","a_kernel(int, float)","Launch Statistics","Registers Per Thread","","168"\n'
        '"1","b","GPU Speed Of Light","Duration","us","3"\n'
        '"1","b","a rule","","",""\n'
    )
    assert benchmark_module("profile_kernels").parse(said) == [
        {"kernel": "a_kernel(int, float)",
         "metrics": {"Duration (us)": "12.5", "Registers Per Thread": "168"}},
        {"kernel": "b", "metrics": {"Duration (us)": "3"}},
    ]  # fmt: skip
