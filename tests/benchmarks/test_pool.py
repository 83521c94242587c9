"""Jobs of a run on a GPU: side by side, before a deadline, and each measuring alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pixart_rt.bench import gpu_lock

CHECKOUT = Path(__file__).resolve().parents[2]
Module = Callable[[str], ModuleType]


@pytest.fixture
def pool(benchmark_module: Module) -> Any:
    return benchmark_module("gpu.pool")


def job(pool: Any, name: str, code: str, *needs: str) -> Any:
    return pool.Job(name=name, part="p", command=(sys.executable, "-c", code), needs=needs)


def run(pool: Any, logs: Path, *stages: Any, seconds: float = 60) -> dict[str, str]:
    results = pool.run(stages, logs, time.monotonic() + seconds, tell=lambda _: None)
    assert len({result.job.name for result in results}) == len(results)
    return {result.job.name: result.state for result in results}


def gone(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().split(")")[1].split()[0] == "Z"


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def hanging(folder: Path) -> str:
    """The code of a job that starts a child, names both, and never ends."""
    sleeper = "import time; time.sleep(600)"
    return (
        f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleeper}'])\n"
        f"open({str(folder / 'new')!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}')\n"
        f"os.rename({str(folder / 'new')!r}, {str(folder / 'pids')!r}); p.wait()"
    )


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
    stages = [
        pool.Stage(jobs=(job(pool, "long", hanging(tmp_path)), job(pool, "waits", "pass"))),
        pool.Stage(jobs=(job(pool, "later", "pass"),)),
    ]
    states = run(pool, tmp_path, *stages, seconds=5)
    assert states["long"] == "stopped: no time left"
    assert states["waits"] == states["later"] == "not started: no time left"
    for process in map(int, (tmp_path / "pids").read_text().split()):
        assert eventually(lambda process=process: gone(process)), "it, or its child, still runs"


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


def test_a_job_that_hangs_is_stopped_at_its_limit(pool: Any, tmp_path: Path) -> None:
    jobs = (
        pool.Job(name="hangs", part="p", limit=5, command=(sys.executable, "-c",
                                                           hanging(tmp_path))),
        job(pool, "after", "pass"),
    )  # fmt: skip
    assert run(pool, tmp_path, pool.Stage(jobs=jobs)) == {
        "hangs": "stopped: took over 5 s", "after": "done"
    }  # fmt: skip
    for process in map(int, (tmp_path / "pids").read_text().split()):
        assert eventually(lambda process=process: gone(process)), "it, or its child, still runs"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_jobs_die_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    """However it ends; by SIGTERM it also says which job it ended."""
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "from benchmarks.gpu import __main__, pool\n"
        "signal.signal(signal.SIGTERM, __main__._leave)\n"
        f"command = (sys.executable, '-c', {hanging(tmp_path)!r})\n"
        "job = pool.Job(name='j', part='p', command=command)\n"
        "results = []\n"
        "try: pool.run([pool.Stage(jobs=(job,))], Path(sys.argv[1]), time.monotonic() + 600,\n"
        "              results=results)\n"
        "finally: print(*(each.state for each in results))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert eventually((tmp_path / "pids").exists)
    parent.send_signal(number)
    said, _ = parent.communicate(timeout=60)
    assert said.strip() == ("stopped: the run was ended" if number == signal.SIGTERM else "")
    for process in map(int, (tmp_path / "pids").read_text().split()):
        assert eventually(lambda process=process: gone(process)), "it, or its child, still runs"


def test_what_cannot_run_here_is_told_and_is_no_failure(pool: Any, tmp_path: Path) -> None:
    no = pool.Job(name="no", part="p", command=("no-such-program",), cannot="it needs a GPU")
    results = pool.run([pool.Stage(jobs=(no,))], tmp_path, time.monotonic() + 60)
    assert results[0].state == "not started: it needs a GPU" and results[0].well


def test_a_jobs_lines_are_shown_as_they_come(pool: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    talks = job(pool, "talks", "print('one\\ntwo'); print('three', end='')")
    pool.run([pool.Stage(jobs=(talks,))], tmp_path, time.monotonic() + 60, tell=lines.append)
    assert lines[:2] == ["talks: one", "talks: two"] and lines[2].endswith("done")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("call", ["check", "measure"])
def test_parts_bring_what_they_need(
    benchmark_module: Module, tmp_path: Path, small: bool, call: str
) -> None:
    jobs = benchmark_module("gpu.jobs")

    def of(*parts: str) -> list[Any]:
        return [job for stage in jobs.stages(call, tmp_path, small, parts) for job in stage.jobs]

    parts = jobs.parts_of(call)
    everything = of(*parts)
    assert len({job.name for job in everything}) == len(everything)
    assert {job.part for job in everything} == set(parts)
    assert {job.part for job in of()} == set(parts) - set(jobs.EXTRA), "minutes only when asked"
    seen: set[str] = set()
    for each in everything:
        assert seen.issuperset(each.needs), f"{each.name} stands before what it needs"
        seen.add(each.name)
    if call == "measure":
        wanted = ["image-folder", "image-build", "image"]
        assert [job.name for job in of("image")] == wanted
        assert of()[0].name.startswith("steps-compiled"), "what compiles longest comes first"
    elif not small:
        tests = [job for job in everything if job.part == "tests"]
        assert tests[0].limit <= 60 and all("gpu" in job.command for job in tests)


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
from pixart_rt.bench.gpu_lock import alone
log = open(sys.argv[1], "a", buffering=1)
for _ in range(2):
    log.write("compiling\\n")
    with alone(), alone():  # nested
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
    command = [sys.executable, "-m", "pixart_rt.bench.gpu_lock", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=CHECKOUT, env=environment).returncode == 7


@pytest.mark.parametrize("old", [False, True], ids=["torch 2.13", "torch 2.11"])
def test_the_compilers_timings_take_their_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: bool
) -> None:
    from torch._inductor.runtime import benchmarking

    monkeypatch.setenv(gpu_lock.LOCK, str(tmp_path / "lock"))
    depths = []

    class Base:
        def benchmark_gpu(self) -> str:
            depths.append(gpu_lock._turn.depth)
            return "timed"

    class Derived(Base):
        pass

    if old:
        stand_in = SimpleNamespace(TritonBenchmarker=Base, InductorBenchmarker=Derived)
        monkeypatch.setattr("torch._inductor.runtime.benchmarking", stand_in)
        gpu_lock.compiler_waits()
        assert Derived().benchmark_gpu() == "timed" and depths == [1]
        return
    if not hasattr(benchmarking, "set_gpu_benchmark_lock_context"):
        pytest.skip("torch before 2.13 has no such setting")
    before = benchmarking.set_gpu_benchmark_lock_context(None)
    try:
        gpu_lock.compiler_waits()
        timed = benchmarking.gpu_benchmark_lock(Base.benchmark_gpu)
        assert timed(Base()) == "timed" and depths == [1]
    finally:
        benchmarking.set_gpu_benchmark_lock_context(before)
