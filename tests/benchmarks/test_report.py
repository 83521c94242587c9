"""What a run on a GPU tells: bars, tables, plots; and that one without a GPU is no measurement."""

from __future__ import annotations

import copy
import json
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
            "errors": {"ours": 1e-3, "eager": 2e-3}, "against_float64": True, "flops": 1e11,
            "seconds": seconds}  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    """As `report.collect` makes it, of a run on a GPU that missed one bar and met one of each."""
    loop = {"pixels": 256, "images": 1, "quality": "high", "prompt_tokens": 30, "agrees": True}
    stages = {"text_encoder": 0.01, "denoising": 0.4, "vae_decoder": 0.03}
    bench = {"systems": {"pixart_rt": {"backends": {"transformer": "torch"}, "series": [
        {"prompts": "new", "p50_s": 0.45, "p90_s": 0.46,
         "stages_mean_s": stages}]}}}  # fmt: skip
    training = {"form": "ours compiled", "pixels": 256, "batch": 128, "difference": 1e-6,
                "most_different": "loss", "mfu": 0.4, "memory_bytes": 2**34}  # fmt: skip
    return {
        "date": "2030-01-01", "commit": "abc", "command": "benchmarks/h200.sh OUT",
        "versions": {"torch": "t", "triton": "r", "diffusers": "d"},
        "hardware": {"gpu": "a GPU"}, "measured": True, "seconds": 500.0,
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
                     training | {"form": "diffusers", "out_of_memory": True}],
        "training_compared": [{"pixels": 256, "speedup": 1.2, "mfu": 0.4}],
        "images": [bench], "tensorrt_rtx": [],
        "profile": [{"kernel": "k", "metrics": {"Duration (us)": "12"}}],
    }  # fmt: skip


def with_bars(report: ModuleType, found: dict[str, Any]) -> dict[str, Any]:
    return found | {"bars": report.bars(found)}


def test_bars_are_met_missed_or_not_measured(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("h200.report")
    rows = {row["name"]: row for row in report.bars(found)}
    step256 = rows["DiT step 256 px, compiled diffusers over ours"]
    assert step256["found"] == pytest.approx(1.5) and step256["met"] is True
    assert rows["DiT step 512 px, compiled diffusers over ours"]["met"] is None, "it was wrong"
    attention = rows["attention 1024 px, best SDPA over ours"]
    assert attention["found"] == pytest.approx(0.9) and attention["met"] is False
    assert rows["training step 256 px, fastest diffusers over ours"]["met"] is True
    assert rows["training step 256 px, MFU"]["met"] is False
    assert rows["image 1024 px, 20 steps, p50"]["met"] is True, "less is better here"
    found["images"][0]["systems"]["pixart_rt"]["series"][0]["p50_s"] = 0.5
    rows = {row["name"]: row for row in report.bars(found)}
    assert rows["image 1024 px, 20 steps, p50"]["met"] is False


def test_the_page_says_what_was_found_and_what_went_wrong(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("h200.report")
    for page in (report.markdown(with_bars(report, found)), report.text(with_bars(report, found))):
        assert "tune: failed with exit code 1 (why)" in page
        rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
                for line in page.splitlines() if line.startswith("|")}  # fmt: skip
        assert rows["diffusers compiled"] == ["3", "wrong (7.0e-01)"]
        assert rows["ours fused"] == ["2", "failed"] and "RuntimeError: no" in page
        assert rows["ours, whole loop in a graph, high"] == ["2", "-"]
        assert rows["attention_qkv_packed"][1:7] == [
            "1e+03", "100 TFLOP/s", "5e+03", "2e+03", "900", "1.0e-03"
        ]  # fmt: skip
        assert rows["attention 1024 px, best SDPA over ours"] == ["≥ 1 x", "0.9 x", "missed"]
        assert "out of memory" in page and "Duration (us)" in page


def test_a_run_without_a_gpu_is_no_measurement(
    benchmark_module: Module, found: dict[str, Any]
) -> None:
    report = benchmark_module("h200.report")
    found = with_bars(report, found) | {"measured": False}
    assert "No GPU" in report.text(found)
    with pytest.raises(SystemExit, match="without a GPU"):
        report.markdown(found)


def test_every_part_that_ran_has_its_picture(
    benchmark_module: Module, found: dict[str, Any], tmp_path: Path
) -> None:
    plots = benchmark_module("h200.plots")
    names = {path.stem for path in plots.write_plots(found, tmp_path)}
    assert names == {f"h200-{name}" for name in plots.PLOTS}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    nothing = copy.deepcopy(found) | {"steps": [], "limits": None, "kernels": [], "training": []}
    (tmp_path / "none").mkdir()
    assert plots.write_plots(nothing, tmp_path / "none") == []


def test_results_of_parts_are_joined(benchmark_module: Module, tmp_path: Path) -> None:
    pool, report = benchmark_module("h200.pool"), benchmark_module("h200.report")
    results = []
    for k, state in enumerate(("done", "failed with exit code 1", "done")):
        output = tmp_path / f"{k}.json"
        if k < 2:
            output.write_text(json.dumps({"rows": [step("diffusers", 256, k + 1.0)]}))
        job = pool.Job(name=str(k), part="steps", command=(), output=output)
        results.append(pool.Result(job=job, state=state))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.log").write_text("Traceback\nValueError: that\n\n")
    found = report.collect(tmp_path, results, 1.0)
    assert [row["seconds"] for row in found["steps"]] == [1.0, 2.0]
    assert found["jobs"][1]["said"] == "ValueError: that" and found["jobs"][0]["said"] == ""
    assert all(row["met"] is None for row in found["bars"]) and found["limits"] is None


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
