"""What must stand beside a number: kernels that were refused, and errors, a row at a time.

A kernel that the self-test refuses is replaced by its reference, so that "ours fused" may be
PyTorch's operators. Every row of a benchmark names them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from benchmarks.provenance import first_line
from pixart_rt.kernels import catalog, launch

RESUME = "--resume"


EVERY = tuple(operator.name for operator in catalog.OPERATORS)


def kernels_tested(device: torch.device, *dtypes: torch.dtype, training: bool = False) -> None:
    """Compare every kernel with its reference on this GPU. Without a GPU there is nothing to do."""
    if device.type == "cuda":
        self_test: Any = catalog.self_test
        for dtype in dtypes:
            self_test(device, dtype, EVERY, training=training)


def refused() -> list[str]:
    """The kernels that run as their references, each with the reason."""
    return [f"{operator}: {why}" for (operator, _), why in sorted(launch.refused().items())]


def failure(error: Exception) -> dict[str, Any]:
    """The end of a row whose measurement raised, whatever it was: Triton's errors have no base but
    Exception. The other rows go on.
    """
    return {"agrees": False, "failed": first_line(error)}


def usable(device: torch.device) -> bool:
    """Whether the GPU answers this process: after an illegal access every later call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def start_again() -> None:
    """Run this program anew, with what it has saved: the GPU does not answer this process."""
    words = [word for word in sys.orig_argv if word != RESUME]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words[1:], RESUME])
