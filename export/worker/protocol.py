"""Processes of our own that answer one request: JSON on stdin, JSON on stdout, a log on stderr.

For what may abort, be killed for its memory, or needs another environment than this process has.
Imports nothing heavy: a worker loads only what its work needs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pixart_rt.errors import BuildError

LOG_LINES = 40  # kept of a worker's log
REASON_LINES = 3  # of it in an error message


class Refused(Exception):
    """The request cannot be done; the message says why."""


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer one request with what `work` makes of it; a Refused becomes {"error": ...}."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # what native code prints must not mix with the answer
    request = json.load(sys.stdin)
    try:
        answer = work(request)
    except Refused as error:
        answer = {"error": str(error)}
    with os.fdopen(answer_fd, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


def ask(
    worker: str,
    request: Mapping[str, Any],
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    advice: Callable[[str], str] = lambda reason: "",
) -> tuple[dict[str, Any], str]:
    """The answer of the module `worker` and the end of its log, or a BuildError that tells what
    ended it. `name` is what was to be built; `environment` replaces this process's own.
    """
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with tempfile.TemporaryFile("w+", errors="replace", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-P", "-m", worker],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**(os.environ if environment is None else environment), "PYTHONPATH": paths},
        )
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()][-LOG_LINES:]
    answer = json.loads(done.stdout) if done.returncode == 0 else {}
    if "error" in answer:
        reason = " ".join(answer["error"].split())
        raise BuildError(f"{name} was not built: {reason}{advice(reason)}")
    if done.returncode:
        last = " | ".join(lines[-REASON_LINES:]) or "nothing"
        raise BuildError(f"{name} was not built: {_end(done.returncode)}; it last wrote: {last}")
    return answer, "\n".join(lines)


def _end(code: int) -> str:
    """How a process ended, in words."""
    if code == -signal.SIGKILL:
        return (
            "the builder was killed, most likely for its memory (a build needs about 4 times the "
            "engine's size); free memory or split the component"
        )
    if code < 0:
        return f"the library crashed with {signal.Signals(-code).name}"
    return f"the builder ended with exit code {code}"


def peak_memory() -> int:
    """The peak resident memory of this process in bytes.

    Not getrusage where /proc has it: ru_maxrss starts from the parent's, across fork and exec.
    """
    status = Path("/proc/self/status")
    if status.exists() and (
        found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    ):
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
