"""Runs jobs in processes of their own, some side by side, all before a deadline.

A job that fails, or that time runs out for, is told and does not stop the others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.turns import LOCK

POLL = 0.2  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that writes `output`. `needs` are the jobs whose results it reads; of the jobs of
    one `group`, one runs at a time.
    """

    name: str
    part: str
    command: tuple[str, ...]
    output: Path | None = None
    needs: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Jobs that may run at the same time, `slots` of them at once, in order."""

    jobs: tuple[Job, ...]
    slots: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How a job ended: done, failed (its exit code), out of time, or not started and why."""

    job: Job
    state: str
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.state == "done"


@dataclass(slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float


def run(
    stages: Sequence[Stage], logs: Path, deadline: float, tell: Callable[[str], None] = print
) -> list[Result]:
    """Every job's result, in the order they ended. `deadline` is a time of time.monotonic()."""
    results: list[Result] = []
    environment = {**os.environ, LOCK: str(logs / "gpu.lock")}
    for stage in stages:
        waiting, running = list(stage.jobs), list[_Running]()
        while waiting or running:
            if time.monotonic() > deadline:
                results += [_stop(each) for each in running]
                results += [Result(job=job, state="not started: no time left") for job in waiting]
                waiting, running = [], []
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                results.append(_ended(each))
                tell(_line(results[-1]))
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
    return results


def _next(waiting: list[Job], running: list[Job], results: list[Result]) -> Job | None:
    """The first whose needs have ended, well or not, and whose group is free."""
    ended = {result.job.name for result in results}
    groups = {job.group for job in running if job.group}
    for job in waiting:
        if ended.issuperset(job.needs) and job.group not in groups:
            return job
    return None


def _missing(job: Job, results: list[Result]) -> str | None:
    done = {result.job.name for result in results if result.done}
    if wanted := [need for need in job.needs if need not in done]:
        return f"{wanted[0]} is not done"
    return None if shutil.which(job.command[0]) else f"{job.command[0]} is not on the path"


def _start(job: Job, logs: Path, environment: dict[str, str]) -> _Running:
    with (logs / f"{job.name}.log").open("wb") as log:
        process = subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return _Running(job, process, time.monotonic())


def _ended(running: _Running) -> Result:
    code, seconds = running.process.returncode, time.monotonic() - running.started
    state = "done" if code == 0 else f"failed with exit code {code}"
    return Result(job=running.job, state=state, seconds=seconds)


def _stop(running: _Running) -> Result:
    """Ends a job and all that it started."""
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    seconds = time.monotonic() - running.started
    return Result(job=running.job, state="stopped: no time left", seconds=seconds)


def _line(result: Result) -> str:
    return f"{result.seconds:6.0f} s  {result.job.name:36} {result.state}"
