"""The measuring programs run without a GPU, say so, and time nothing that is wrong."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pixart_rt.bench.provenance import ResultFile
from pixart_rt.kernels import launch

CHECKOUT = Path(__file__).resolve().parents[2]
Module = Callable[[str], ModuleType]


def run(
    module: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--json", str(out), *words])
    return module.main(), json.loads(out.read_text())


def test_forms_of_a_step_agree(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = benchmark_module("model")
    words = ("--batch", "3", "--forms", "diffusers,ours fused")
    code, found = run(model, monkeypatch, tmp_path / "m.json", *words)
    assert code == 0 and found["measured"] is False
    (row,) = found["rows"]
    assert row["form"] == "diffusers" and row["seconds"] > 0
    assert 1e-4 < row["error"] < 2e-2, "bfloat16 differs from float32, a little"
    assert [row["because"] for row in found["not_run"]] == ["no GPU"]


@pytest.mark.parametrize("wrong", ["mask", "timestep"])
def test_a_form_that_is_wrong_has_no_time(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    model = benchmark_module("model")
    before = model.Peer.__init__

    def broken(self: Any, config: Any, state: Any, inputs: dict[str, Any]) -> None:
        changed = {
            "mask": lambda: torch.ones_like(inputs["mask"]),
            "timestep": lambda: inputs["timestep"] + 300,
        }
        before(self, config, state, inputs | {wrong: changed[wrong]()})

    monkeypatch.setattr(model.Peer, "__init__", broken)
    code, found = run(model, monkeypatch, tmp_path / "m.json", "--forms", "diffusers")
    (row,) = found["rows"]
    assert code == 1 and not row["agrees"] and "seconds" not in row


def test_kernels_errors_are_against_float64(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    """On the CPU ours are the references, in half precision as eager PyTorch's."""
    kernels = benchmark_module("kernels")
    code, found = run(kernels, monkeypatch, tmp_path / "k.json")
    assert code == 0 and found["measured"] is False
    operators = {row["operator"]: row for row in found["rows"]}
    assert len(operators) == len(found["rows"]) >= 11
    for row in found["rows"]:
        assert row["against_float64"] and row["seconds"]["ours"] > 0 and row["agrees"]
        assert row["refused_kernels"] == []
        assert row["errors"]["ours"] < 5e-3, row["operator"]
    assert operators["attention_qkv_packed"]["errors"]["eager"] > 1e-5, "not float64 itself"


def test_the_loop_is_timed_by_the_step(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    loop = benchmark_module("loop")
    words = ("--model", "tiny", "--res", "256", "--steps", "1", "--images", "2")
    with torch.no_grad():
        code, found = run(loop, monkeypatch, tmp_path / "l.json", *words)
    assert code == 0 and found["measured"] is False
    assert [row["prompt_tokens"] for row in found["rows"]] == list(loop.PROMPTS)
    assert all(row["agrees"] and row["graph_replays"] == 0 for row in found["rows"])


def test_triton_s_own_errors_leave_the_other_rows(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    """OutOfResources is no RuntimeError. What else is true of a row stands next to it."""
    from triton.runtime.errors import OutOfResources

    kernels = benchmark_module("kernels")
    few = ("ln_modulate", "linear_gelu", "cfg_dpmpp_step")

    def cases(*given: Any) -> Any:
        for case in before(*given):
            if case.operator == "linear_gelu":
                yield replace(case, ours=out_of_resources)
            elif case.operator in few:
                yield replace(case, candidates={"FA9": out_of_resources})

    def out_of_resources(*_: Any) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    assert not issubclass(OutOfResources, RuntimeError)
    before = kernels.cases
    monkeypatch.setattr(kernels, "cases", cases)
    code, found = run(kernels, monkeypatch, tmp_path / "k.json")
    rows = {row["operator"]: row for row in found["rows"]}
    assert code == 1 and tuple(rows) == few
    assert rows["linear_gelu"]["failed"].startswith("OutOfResources: out of resource: shared")
    assert "seconds" not in rows["linear_gelu"] and not rows["linear_gelu"]["agrees"]
    for name in ("ln_modulate", "cfg_dpmpp_step"):
        seconds = rows[name]["seconds"]
        assert rows[name]["agrees"] and seconds["ours"] > 0
        assert seconds["FA9"].startswith("OutOfResources"), "a candidate's failure is its own"


@pytest.mark.parametrize("name", ["kernels", "model", "loop", "train_step"])
def test_every_row_names_the_refused_kernels(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str,
    no_kernels: None,
) -> None:  # fmt: skip
    module = benchmark_module(name)
    refusal = {("ln_modulate", 0, torch.float16): "its error is 9 times"}
    monkeypatch.setattr(launch, "_refused", refusal)
    words = {
        "kernels": (),
        "model": ("--forms", "diffusers"),
        "loop": ("--model", "tiny", "--res", "256", "--steps", "1", "--prompts", "12"),
        "train_step": ("--forms", "ours", "--model", "tiny", "--res", "64", "--batch", "2",
                       "--steps", "1"),
    }[name]  # fmt: skip
    if name == "kernels":
        monkeypatch.setattr(module, "cases", one_of(module.cases))
    with torch.set_grad_enabled(name != "loop"):
        _, found = run(module, monkeypatch, tmp_path / "x.json", *words)
    (row,) = found["rows"]
    assert row["seconds"] and row["refused_kernels"] == [
        "ln_modulate in float16: its error is 9 times"
    ]


def one_of(cases: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: itertools.islice(cases(*given), 1)


def test_a_kernel_that_is_wrong_has_no_time(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_kernels: None
) -> None:
    kernels = benchmark_module("kernels")
    cases = kernels.cases

    def wrong(*given: Any) -> Any:
        case = next(cases(*given))
        yield replace(case, ours=lambda *inputs: case.plain(*inputs) * float("nan"))

    monkeypatch.setattr(kernels, "cases", wrong)
    code, found = run(kernels, monkeypatch, tmp_path / "k.json")
    (row,) = found["rows"]
    assert code == 1 and row["agrees"] is False and "seconds" not in row


def broken_operators() -> tuple[launch.Operator, ...]:
    """Two that are wrong, each in a way of its own, one that raises, and one that is right."""

    def example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    def forgets_one(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[1:] = x[1:] * 2
        return out

    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy * 2.1

    def raises(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such tile")

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    return tuple(
        launch.Operator(name, launch.SM70, run, double, example, trains=trains)
        for name, run, trains in (
            ("forgets", forgets_one, False), ("backward", WrongBackward.apply, True),
            ("raises", raises, False), ("right", double, True),
        )
    )  # fmt: skip


def test_the_checks_see_what_is_wrong(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks = benchmark_module("checks")
    monkeypatch.setattr(checks.catalog, "OPERATORS", broken_operators())
    out = tmp_path / "c.json"
    monkeypatch.setattr(sys, "argv", ["checks.py", "operators", "--dtypes", "float16", "--json",
                                      str(out)])  # fmt: skip
    code = checks.main()
    rows = {row["subject"]: row for row in json.loads(out.read_text())["rows"]}
    assert code == 1
    assert {name: row["agrees"] for name, row in rows.items()} == {
        "forgets": False, "backward": False, "raises": False, "right": True
    }  # fmt: skip
    assert rows["forgets"]["error"] == float("inf"), "memory was poisoned"
    assert rows["backward"]["with_gradients"] and rows["backward"]["error"] > 0.04
    assert rows["raises"]["failed"] == "ValueError: no such tile"
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_after_an_illegal_access_run_in_another_process(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU that an illegal access broke answers a process no more; what it had saved stays."""
    checks, rows = benchmark_module("checks"), benchmark_module("rows")
    out = tmp_path / "c.json"
    monkeypatch.setattr(checks.catalog, "OPERATORS", broken_operators())
    monkeypatch.setattr(rows, "usable", lambda: False)
    started: list[int] = []

    def again() -> None:
        started.append(1)
        raise SystemExit("another process begins")

    monkeypatch.setattr(rows, "start_again", again)
    words = ["checks.py", "operators", "--dtypes", "float16", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="another process"):
        checks.main()
    assert [row["subject"] for row in json.loads(out.read_text())["rows"]][-1] == "raises"
    monkeypatch.setattr(sys, "argv", [*words, "--resume"])
    assert checks.main() == 1
    subjects = [row["subject"] for row in json.loads(out.read_text())["rows"]]
    assert subjects == ["forgets", "backward", "raises", "right"] and len(started) == 1


def test_a_program_starts_again_with_its_own_words(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from benchmarks import rows\n"
        "print(sys.argv[1:], flush=True)\n"
        "if '--resume' not in sys.argv: rows.start_again()\n"
    )
    (tmp_path / "again.py").write_text(code)
    ran = subprocess.run([sys.executable, tmp_path / "again.py", "--json", "x"], cwd=CHECKOUT,
                         env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True,
                         text=True)  # fmt: skip
    assert ran.stdout.splitlines() == ["['--json', 'x']", "['--json', 'x', '--resume']"], ran.stderr


def test_with_a_gpu_the_kernels_tests_are_found_by_their_mark() -> None:
    """`-m gpu` selects those that run on a device, and without a GPU none of them."""
    code = (
        "import sys, pytest, torch\n"
        "torch.cuda.is_available = lambda: sys.argv[1] == 'GPU'\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', '-m', 'gpu',\n"
        "                      'tests/kernels/test_solver.py']))\n"
    )
    said = [
        subprocess.run([sys.executable, "-c", code, word], cwd=CHECKOUT, capture_output=True,
                       text=True).stdout
        for word in ("GPU", "none")
    ]  # fmt: skip
    found = [line for line in said[0].splitlines() if "test_solver.py::" in line]
    assert found and "test_other_solvers_are_refused" not in said[0], "it needs no device"
    assert "test_solver.py::" not in said[1]


@pytest.mark.parametrize("ends", [True, False])
def test_tables_are_kept_after_every_entry(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: bool
) -> None:
    tune = benchmark_module("tune")
    out = tmp_path / "t.json"

    def search(device: Any, dtype: Any, *, save: Any, seconds: float, **_: Any) -> dict[str, Any]:
        assert seconds == 9
        table = {"operators": {"ln_modulate": {}}, "failed": ["attention 1x2: no memory"]}
        save(table)
        assert json.loads(out.read_text())["table"] == table
        if not ends:
            raise ValueError("the driver is gone")
        return table

    monkeypatch.setattr(tune.tuning, "tune", search)
    values = tune.run(torch.device("cpu"), lambda call: 0.0, ResultFile(out), 9)
    assert list(values["table"]["operators"]) == ["ln_modulate"]
    failed = [row["failed"] for row in json.loads(out.read_text())["rows"]]
    assert failed[0] == "attention 1x2: no memory" and len(failed) == (1 if ends else 2)
    assert ends or "the driver is gone" in failed[1]


@pytest.mark.slow
def test_the_whole_script_runs_small(tmp_path: Path) -> None:
    """Limits: from the shell to the report. The commit and the command are the caller's."""
    ran = subprocess.run(
        [CHECKOUT / "benchmarks" / "gpu" / "run.sh", "measure", "--small", "--parts", "limits",
         "--commit", "abc"],
        capture_output=True, text=True,
        env={**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "measure-cpu.json").read_text())
    assert found["measured"] is False and "No GPU" in ran.stdout
    assert [job["state"] for job in found["jobs"]] == ["done"]
    assert all(row["met"] is None for row in found["bars"])
    assert found["commit"] == "abc"
    assert found["command"] == ("benchmarks/gpu/run.sh measure --small --parts limits --commit abc")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"measure-cpu.json", "measure-cpu.tar.gz"}


@pytest.mark.parametrize("name", ["model", "train_step"])
def test_a_form_that_fails_leaves_the_others(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str,
    no_kernels: None,
) -> None:  # fmt: skip
    """And what was measured before is on the disk when it does."""
    module = benchmark_module(name)
    before, out = module.measure, tmp_path / "x.json"

    def failing(form: Any, *given: Any) -> Any:
        if getattr(form, "name", form) == "diffusers":
            raise torch.OutOfMemoryError("out of memory\nmore")
        assert json.loads(out.read_text())["rows"][0]["failed"], "not yet saved"
        return before(form, *given)

    monkeypatch.setattr(module, "measure", failing)
    words = {
        "model": ("--forms", "diffusers,ours reference compiled"),
        "train_step": ("--forms", "diffusers,ours", "--model", "tiny", "--res", "64", "--batch",
                       "2", "--steps", "1"),
    }[name]  # fmt: skip
    if name == "model":
        monkeypatch.setattr(module, "COMPILED", ())
    code, found = run(module, monkeypatch, out, *words)
    failed, good = found["rows"]
    assert code == 1 and failed["failed"] == "OutOfMemoryError: out of memory"
    assert "seconds" not in failed and good["seconds"] > 0
