"""Jobs of a run on a GPU: side by side, before a deadline, and each measuring alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
Module = Callable[[str], ModuleType]


@pytest.fixture
def pool(benchmark_module: Module) -> Any:
    return benchmark_module("h200.pool")


def job(pool: Any, name: str, code: str, *needs: str) -> Any:
    return pool.Job(name=name, part="p", command=(sys.executable, "-c", code), needs=needs)


def run(pool: Any, logs: Path, *stages: Any, seconds: float = 60) -> dict[str, str]:
    results = pool.run(stages, logs, time.monotonic() + seconds, tell=lambda _: None)
    assert len({result.job.name for result in results}) == len(results)
    return {result.job.name: result.state for result in results}


def test_a_failure_is_told_and_stops_only_what_needs_it(pool: Any, tmp_path: Path) -> None:
    jobs = (
        job(pool, "needs-bad", "open('a', 'w')", "bad"),
        job(pool, "bad", "print('why'); raise SystemExit(3)"),
        job(pool, "good", "pass"),
        job(pool, "needs-good", "pass", "good"),
        pool.Job(name="no such", part="p", command=("no-such-program",)),
    )
    states = run(pool, tmp_path, pool.Stage(jobs=jobs, slots=2))
    assert states == {
        "bad": "failed with exit code 3",
        "needs-bad": "not started: bad is not done",
        "good": "done",
        "needs-good": "done",
        "no such": "not started: no-such-program is not on the path",
    }
    assert (tmp_path / "bad.log").read_text().strip() == "why"


def test_nothing_outlives_the_deadline(pool: Any, tmp_path: Path) -> None:
    """Not even what a job started."""
    sleeper = "import time; time.sleep(600)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleeper}']); "
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    stages = [
        pool.Stage(jobs=(job(pool, "long", code), job(pool, "waits", "pass"))),
        pool.Stage(jobs=(job(pool, "later", "pass"),)),
    ]
    states = run(pool, tmp_path, *stages, seconds=3)
    assert states["long"] == "stopped: no time left"
    assert states["waits"] == states["later"] == "not started: no time left"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the job's child still runs")


def test_as_many_run_together_as_there_are_slots(pool: Any, tmp_path: Path) -> None:
    """Each waits until it has seen the other, which neither could alone."""
    code = (
        "import pathlib, sys, time; d = pathlib.Path({folder!r}); (d / {mine!r}).touch()\n"
        "end = time.monotonic() + 30\n"
        "while not (d / {other!r}).exists():\n"
        "    time.sleep(0.02)\n"
        "    if time.monotonic() > end: sys.exit(1)\n"
    )
    jobs = tuple(
        job(pool, mine, code.format(folder=str(tmp_path), mine=mine, other=other))
        for mine, other in (("a", "b"), ("b", "a"))
    )
    assert run(pool, tmp_path, pool.Stage(jobs=jobs, slots=2)) == {"a": "done", "b": "done"}


@pytest.mark.parametrize("small", [False, True])
def test_parts_bring_what_they_need(benchmark_module: Module, tmp_path: Path, small: bool) -> None:
    jobs = benchmark_module("h200.jobs")

    def names(*parts: str) -> list[str]:
        return [job.name for stage in jobs.stages(tmp_path, parts, small) for job in stage.jobs]

    everything = names(*jobs.PARTS, *jobs.EXTRA)
    assert len(everything) == len(set(everything))
    assert {job.part for stage in jobs.stages(tmp_path, [*jobs.PARTS, *jobs.EXTRA], small)
            for job in stage.jobs} == {*jobs.PARTS, *jobs.EXTRA}  # fmt: skip
    assert names("image") == ["image-folder", "image-build", "image-diffusers"]
    assert names("rtx") == ["image-folder", "rtx-build", "rtx-bench"]
    assert names("limits") == ["limits"]
    seen: set[str] = set()
    for stage in jobs.stages(tmp_path, [*jobs.PARTS, *jobs.EXTRA], small):
        for job in stage.jobs:
            assert seen.issuperset(job.needs), f"{job.name} stands before what it needs"
            seen.add(job.name)


def test_of_a_group_one_runs_at_a_time(pool: Any, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time; p = pathlib.Path({path!r})\n"
        "os.close(os.open(p, os.O_CREAT | os.O_EXCL)); time.sleep(0.3); p.unlink()\n"
    ).format(path=str(tmp_path / "only one"))
    jobs = tuple(
        pool.Job(name=name, part="p", command=(sys.executable, "-c", code), group="g")
        for name in "abc"
    )
    assert set(run(pool, tmp_path, pool.Stage(jobs=jobs, slots=3)).values()) == {"done"}


HOLDER = """
import sys, time
from benchmarks.turns import alone, aside
log = open(sys.argv[1], "a", buffering=1)
with alone():
    with aside():
        log.write("compiling\\n")
        with alone():
            log.write("in\\n"); time.sleep(0.2); log.write("out\\n")
    with alone():  # nested
        log.write("in\\n"); time.sleep(0.2); log.write("out\\n")
"""


def test_processes_measure_one_after_the_other(tmp_path: Path) -> None:
    environment = {**os.environ, "PIXART_RT_BENCH_LOCK": str(tmp_path / "lock")}
    log = tmp_path / "log"
    running = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(log)], cwd=CHECKOUT, env=environment)
        for _ in range(3)
    ]
    assert [each.wait(timeout=300) for each in running] == [0, 0, 0]
    marks = [line for line in log.read_text().split() if line != "compiling"]
    assert marks == ["in", "out"] * 6


def test_a_program_of_others_can_have_the_gpu_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PIXART_RT_BENCH_LOCK": str(tmp_path / "lock")}
    code = (
        "import fcntl, os, sys; f = os.open(os.environ['PIXART_RT_BENCH_LOCK'], os.O_RDWR)\n"
        "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(7)\n"
    )
    command = [sys.executable, "-m", "benchmarks.turns", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=CHECKOUT, env=environment).returncode == 7


def test_nobody_waits_while_another_compiles(tmp_path: Path) -> None:
    """The first compiles until the second has measured."""
    environment = {**os.environ, "PIXART_RT_BENCH_LOCK": str(tmp_path / "lock")}
    code = (
        "import pathlib, sys, time\n"
        "from benchmarks.turns import alone, aside\n"
        "d, role = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "end = time.monotonic() + 200\n"
        "with alone():\n"
        "    if role == 'compiles':\n"
        "        with aside():\n"
        "            while not (d / 'measured').exists():\n"
        "                time.sleep(0.02)\n"
        "                if time.monotonic() > end: sys.exit(1)\n"
        "    (d / 'measured').touch()\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), role], cwd=CHECKOUT,
                         env=environment)
        for role in ("compiles", "measures")
    ]  # fmt: skip
    assert [each.wait(timeout=300) for each in running] == [0, 0]


@pytest.mark.parametrize("old", [False, True], ids=["torch 2.13", "torch 2.11"])
def test_the_compilers_timings_take_their_turn(
    benchmark_module: Module, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    from torch._inductor.runtime import benchmarking

    turns = benchmark_module("turns")
    depths = []

    class Base:
        def benchmark_gpu(self) -> str:
            depths.append(turns._turn.depth)
            return "timed"

    class Derived(Base):
        pass

    if old:
        stand_in = SimpleNamespace(TritonBenchmarker=Base, InductorBenchmarker=Derived)
        monkeypatch.setattr("torch._inductor.runtime.benchmarking", stand_in)
        turns._let_the_compiler_wait()
        assert Derived().benchmark_gpu() == "timed" and depths == [1]
        return
    before = benchmarking.set_gpu_benchmark_lock_context(None)
    try:
        turns._let_the_compiler_wait()
        timed = benchmarking.gpu_benchmark_lock(Base.benchmark_gpu)
        assert timed(Base()) == "timed" and depths == [1]
    finally:
        benchmarking.set_gpu_benchmark_lock_context(before)
