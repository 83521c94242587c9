"""Run a command that ends with whoever started this, and takes along all that it started itself.

    python -m benchmarks.gpu.keep PARENT COMMAND ...        PARENT: the process id to end with

A process group of its own, which Linux tells when the parent ends, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def signalled_with_parent(number: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def _end_group(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, _end_group)
    signalled_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before Linux was told to watch it
        return 1
    # Should this process be killed itself, the command still ends.
    child = subprocess.Popen(command, preexec_fn=lambda: signalled_with_parent(signal.SIGKILL))
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main())
