"""Whether this PyTorch has kernels for a GPU, from the list of architectures it was built for.

    sm_XY        machine code: runs on X.Z with Z >= Y
    sm_XYa       machine code that uses one GPU's own features: runs on X.Y alone
    sm_XYf       likewise a family's: runs on X.Z with Z >= Y
    compute_XY   PTX, which the driver compiles: runs on X.Y and everything newer

Without one of them the first kernel fails with "no kernel image is available". PyTorch's default
wheels lack sm_70 (V100) from 2.11 on; those for CUDA 12.6 still have it (pytorch/pytorch#172352).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from pixart_rt.errors import BackendError

OLD_WHEELS = "https://download.pytorch.org/whl/cu126"  # sm_50, 60, 70, 75, 80, 86, 90
OLDEST, OLD = (5, 0), (7, 5)  # from OLDEST up to, and without, OLD only those wheels have kernels
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of these, as torch.cuda.get_arch_list() names them, runs on the GPU."""
    major, minor = capability
    for name in architectures:
        match = _ARCHITECTURE.fullmatch(name)
        if match is None:
            continue
        kind, special = match[1], match[4]
        built = int(match[2]), int(match[3])
        if special == "a":
            fits = built == capability
        elif kind == "compute" and not special:
            fits = built <= capability
        else:
            fits = built[0] == major and built[1] <= minor
        if fits:
            return True
    return False


def lacking(device: torch.device | int) -> tuple[str, str] | None:
    """Why this PyTorch cannot run on that CUDA device, and the fix; None if it can.

    A build that does not say what it was built for, as those for AMD's GPUs, is not judged.
    """
    architectures = torch.cuda.get_arch_list()
    if not any(name.startswith("sm_") for name in architectures):
        return None
    capability = torch.cuda.get_device_capability(device)
    if covers(architectures, capability):
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    reason = (
        f"{name} is sm_{major}{minor}, and PyTorch {torch.__version__} has kernels for "
        f"{', '.join(architectures)} only"
    )
    if OLDEST <= capability < OLD:
        return reason, f"pip install torch --index-url {OLD_WHEELS}"
    newer = "a newer PyTorch" if capability >= OLD else "a PyTorch that was built for it"
    return reason, f"install {newer} (https://pytorch.org/get-started/locally/)"


def check_architecture(device: torch.device) -> None:
    """A BackendError, before any kernel is launched, for a GPU without kernels in this PyTorch."""
    if device.type != "cuda":
        return
    found = lacking(device)
    if found is not None:
        reason, fix = found
        raise BackendError(f"the device {device} was requested, but {reason}; {fix}")
