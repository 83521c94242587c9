"""What a run computes with where nobody says: by its device alone."""

from __future__ import annotations

import torch

from pixart_rt.config import Kernels, Precision
from pixart_rt.kernels.catalog import self_test
from pixart_rt.model.dtypes import DTYPES

BF16_SINCE = (8, 0)  # compute capability of the A100, whose tensor cores are the first to have it


def usual_precision(device: torch.device) -> Precision:
    """Of matrix products: bf16, before the A100 fp16, float32 on a CPU."""
    if device.type != "cuda":
        return Precision.FP32
    has_bf16 = torch.cuda.get_device_capability(device) >= BF16_SINCE
    return Precision.BF16 if has_bf16 else Precision.FP16


def check_kernels(device: torch.device, kernels: Kernels, precision: Precision) -> None:
    """Compare the fused operators with their references on this GPU, in autocast's dtype; `use`
    does so in the weights'. Raises as kernels/catalog.py does."""
    if device.type == "cuda" and kernels is Kernels.FUSED:
        self_test(device, DTYPES[precision], training=True)


def usual_kernels(device: torch.device) -> Kernels:
    """The fused operators are for GPUs."""
    return Kernels.FUSED if device.type == "cuda" else Kernels.REFERENCE
