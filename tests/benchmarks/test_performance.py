"""The tables of docs/performance.md come from measurements alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixart_rt.bench.request import BenchRequest
from pixart_rt.bench.run import run


@pytest.fixture(scope="module")
def result(bundle_256: Path) -> dict[str, Any]:
    request = BenchRequest(bundle=bundle_256, steps=2, repeats=1, peers=("diffusers",), cold=False)
    return run(request, "pixart-rt bench made up")


@pytest.fixture
def performance(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("performance")


@pytest.fixture
def doc(performance: Any, tmp_path: Path) -> Path:
    """The document with its markers, and a folder for results next to it."""
    path = tmp_path / "docs" / "performance.md"
    path.parent.mkdir()
    path.write_text(performance.DOC.read_text())
    (tmp_path / "results").mkdir()
    return path


def write(doc: Path, name: str, result: dict[str, Any]) -> Path:
    path = doc.parents[1] / "results" / name
    path.write_text(json.dumps(result))
    return path


def test_tables_stand_between_their_markers(
    performance: Any, doc: Path, result: dict[str, Any]
) -> None:
    results = write(doc, "bench-a.json", result).parent
    (results / "bench-a-stages.png").touch()
    before = doc.read_text()
    performance.write(doc, results)
    text = doc.read_text()
    cpu = text.split("<!-- cpu:begin -->")[1].split("<!-- cpu:end -->")[0]
    assert "pixart-rt bench made up" in cpu and "![bench-a-stages](../results/" in cpu
    rows = [line for line in cpu.splitlines() if line.startswith("| diffusers |")]
    assert len(rows) == 2
    factor = result["speedup"]["diffusers"]["paired"]
    assert f"| {factor:.2f}× |" in rows[1]
    p50 = result["systems"]["diffusers"]["series"][0]["p50_s"]
    assert performance.short(p50) in rows[0]
    assert text.split("<!-- cpu:begin -->")[0] == before.split("<!-- cpu:begin -->")[0]
    for table in cpu.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, "every row has the columns of its head"
    performance.write(doc, results)
    assert doc.read_text() == text, "again is the same"


def test_the_committed_results_make_the_committed_tables(performance: Any) -> None:
    """Every field that the tables read is in the files of before, under its name of before."""
    text = performance.DOC.read_text()
    paths = sorted(performance.RESULTS.glob("bench-*.json"))
    assert paths, "a result is committed"
    for name, body in performance.sections(paths, performance.DOC).items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        assert text.split(begin)[1].split(end)[0] == body


def test_devices_have_sections_of_their_own(
    performance: Any, doc: Path, result: dict[str, Any]
) -> None:
    other = copy.deepcopy(result)
    other["request"]["device"], other["hardware"]["gpu"] = "cuda", "a GPU"
    performance.write(doc, write(doc, "bench-gpu.json", other).parent)
    cpu, gpu = doc.read_text().split("<!-- cpu:end -->")
    assert "a GPU; " in gpu and "Not measured yet." in cpu.split("<!-- cpu:begin -->")[1]


def test_different_images_make_no_table(
    performance: Any, doc: Path, result: dict[str, Any]
) -> None:
    other = copy.deepcopy(result)
    other["agreement"]["diffusers"]["agrees"] = False
    before = doc.read_text()
    with pytest.raises(SystemExit, match="drew other images"):
        performance.write(doc, write(doc, "bench-b.json", other).parent)
    assert doc.read_text() == before


def test_a_call_on_a_gpu_stands_in_its_section(
    benchmark_module: Callable[[str], ModuleType], performance: Any, doc: Path
) -> None:
    """One that was written without a GPU is refused, and the document stays as it was."""
    folder = doc.parents[1] / "results" / "gpu"
    folder.mkdir()
    report = benchmark_module("gpu.report")
    found = report.collect(folder, [], [], 1.0, report.origin("measure"))
    report.write(folder / "measure-cpu.json", found)
    before = doc.read_text()
    with pytest.raises(SystemExit, match="without a GPU"):
        performance.write(doc, folder.parent)
    assert doc.read_text() == before
    (folder / "measure-cpu.json").unlink()
    row = {"form": "ours fused", "pixels": 256, "batch": 2, "agrees": True, "seconds": 0.002}
    measured = found | {
        "measured": True, "steps": [row], "versions": found["versions"] | {"triton": "3"},
        "hardware": found["hardware"] | {"gpu": "a GPU"},
    }  # fmt: skip
    report.write(folder / "measure-card.json", measured | {"bars": report.bars(measured)})
    performance.write(doc, folder.parent)
    section = doc.read_text().split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert "a GPU, torch" in section and "NOT MET" in section
    assert "![measure-card-steps](../results/gpu/measure-card-steps.png)" in section
    assert (folder / "measure-card-steps.png").is_file()
