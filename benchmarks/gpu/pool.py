"""Runs jobs as processes, some side by side, each up to its limit, all before a deadline.

A job that fails, hangs, or that time runs out for, is told and does not stop the others. None
outlives this process, however it ends (keep.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pixart_rt.bench.gpu_lock import LOCK

POLL = 0.2  # seconds
TOLD = 4000  # characters of a job's log that one poll shows, from its end


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that writes `output`, stopped after `limit` seconds.

    `needs` are the jobs whose results it reads; of the jobs of one `group`, one runs at a time;
    `cannot` says why it is not started here, if it is not.
    """

    name: str
    part: str
    command: tuple[str, ...]
    output: Path | None = None
    needs: tuple[str, ...] = ()
    group: str = ""
    limit: float = 600.0
    cannot: str = ""
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Jobs that may run at the same time, `slots` of them at once, in order."""

    jobs: tuple[Job, ...]
    slots: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How a job stands: done, failed (its exit code), stopped, not started and why, or running."""

    job: Job
    state: str
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def well(self) -> bool:
        """Done, or known from the start not to run here."""
        return self.done or bool(self.job.cannot)


@dataclass(slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    log: Path
    shown: int = 0  # bytes of the log

    def stopped(self, why: str) -> Result:
        """End it and all that it started."""
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return Result(job=self.job, state=f"stopped: {why}", seconds=self.seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def news(self) -> list[str]:
        """Whole lines that its log has got since the last call."""
        with self.log.open("rb") as log:
            log.seek(self.shown)
            text = log.read()
        end = text.rfind(b"\n") + 1
        self.shown += end
        return text[:end].decode(errors="replace")[-TOLD:].splitlines()


def run(
    stages: Sequence[Stage],
    logs: Path,
    deadline: float,
    tell: Callable[[str], None] = print,
    results: list[Result] | None = None,
) -> list[Result]:
    """Every job's result, in the order they ended. `deadline` is a time of time.monotonic().

    `results`, if given, is the list to fill, so that a signal loses none of those that ended.
    """
    results = [] if results is None else results
    environment = {**os.environ, LOCK: str(logs / "gpu.lock")}
    running: list[_Running] = []
    try:
        for stage in stages:
            _run_stage(stage, running, results, logs, deadline, tell, environment)
    finally:  # also where a signal ended it
        results += [each.stopped("the run was ended") for each in running]
    return results


def _run_stage(
    stage: Stage, running: list[_Running], results: list[Result], logs: Path, deadline: float,
    tell: Callable[[str], None], environment: dict[str, str],
) -> None:  # fmt: skip
    waiting = list(stage.jobs)

    def end(each: _Running, result: Result) -> None:
        _tell_news(each, tell)
        running.remove(each)
        results.append(result)
        tell(_line(result))

    while waiting or running:
        late = time.monotonic() > deadline
        for each in list(running):
            if each.process.poll() is not None:
                end(each, _ended(each))
            elif late:
                end(each, each.stopped("no time left"))
            elif each.seconds > each.job.limit:
                end(each, each.stopped(f"took over {each.job.limit:.0f} s"))
            else:
                _tell_news(each, tell)
        if late:
            results += [Result(job=job, state="not started: no time left") for job in waiting]
            return
        while waiting and len(running) < stage.slots:
            job = _next(waiting, [each.job for each in running], results)
            if job is None:
                assert running, f"nothing can start any more of {waiting}"
                break
            waiting.remove(job)
            if missing := _missing(job, results):
                results.append(Result(job=job, state=f"not started: {missing}"))
                tell(_line(results[-1]))
                continue
            running.append(_start(job, logs, environment))
        if running:
            time.sleep(POLL)


def _tell_news(each: _Running, tell: Callable[[str], None]) -> None:
    for line in each.news():
        tell(f"{each.job.name}: {line}")


def _next(waiting: list[Job], running: list[Job], results: list[Result]) -> Job | None:
    """The first whose needs have ended, well or not, and whose group is free."""
    ended = {result.job.name for result in results}
    groups = {job.group for job in running if job.group}
    for job in waiting:
        if ended.issuperset(job.needs) and job.group not in groups:
            return job
    return None


def _missing(job: Job, results: list[Result]) -> str | None:
    if job.cannot:
        return job.cannot
    done = {result.job.name for result in results if result.done}
    if wanted := [need for need in job.needs if need not in done]:
        return f"{wanted[0]} is not done"
    return None if shutil.which(job.command[0]) else f"{job.command[0]} is not on the path"


def _start(job: Job, logs: Path, environment: dict[str, str]) -> _Running:
    path, own = logs / f"{job.name}.log", {**environment, **dict(job.environment)}
    kept = (sys.executable, "-m", "benchmarks.gpu.keep", str(os.getpid()), *job.command)
    with path.open("wb") as log:
        process = subprocess.Popen(
            kept, stdout=log, stderr=subprocess.STDOUT, env=own, start_new_session=True
        )
    return _Running(job, process, time.monotonic(), path)


def _ended(running: _Running) -> Result:
    code = running.process.returncode
    state = "done" if code == 0 else f"failed with exit code {code}"
    return Result(job=running.job, state=state, seconds=running.seconds)


def _line(result: Result) -> str:
    return f"{result.seconds:6.0f} s  {result.job.name:36} {result.state}"
