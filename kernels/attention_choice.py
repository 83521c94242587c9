"""Which implementation of softmax attention runs: ours, or one of those that PyTorch can call.

    own     the kernel of attention.py           cudnn   cuDNN's, through PyTorch
    sdpa    what PyTorch picks by itself         flash   FlashAttention 2, inside PyTorch
    fa3     FlashAttention 3, if flash-attn-3 is installed (arXiv:2407.08608)
    fa4     FlashAttention 4, if flash-attn-4 is installed

The tables name the one that was measured to be the fastest (`launch.choice`). All but ours are
PyTorch's scaled_dot_product_attention, which PyTorch differentiates.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from pixart_rt.kernels.launch import choice, unavailable

OWN, PYTORCH = "own", "sdpa"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}
IMPLEMENTATIONS = (OWN, PYTORCH, *BACKENDS)
PROBE_TOKENS = 64


def attend_by(implementation: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√K)·v by one that is not ours; q [B, H, N, K], k and v [B, H, T, K].

    Raises what PyTorch raises where it cannot run.
    """
    if implementation == PYTORCH:
        return F.scaled_dot_product_attention(q, k, v)
    if BACKENDS[implementation] is SDPBackend.FLASH_ATTENTION:
        _activate(implementation)
    with sdpa_kernel(BACKENDS[implementation]):
        return F.scaled_dot_product_attention(q, k, v)


def _activate(implementation: str) -> None:
    """Make this FlashAttention the one that PyTorch calls, in the whole process.

    It stays so: the backward of what it computed is its own, too.
    """
    wanted = None if implementation == "flash" else implementation.upper()
    if current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(wanted)


def chosen(op: str, like: Tensor, shape: tuple[int, int]) -> str:
    """The implementation for `like` [..., K] at (B·H, N): the tables', or ours if it cannot run.

    Raises Unavailable where `choosing` names one that cannot.
    """
    name = choice(op, like, shape, OWN)
    why = "" if name == OWN else problem(name, like.device, like.dtype, like.shape[-1])
    if why:
        unavailable(op, name, why)
        return OWN
    return name


@functools.cache
def problem(implementation: str, device: torch.device, dtype: torch.dtype, head: int) -> str:
    """Why an implementation cannot run here, found by running it; "" if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no such implementation, only {', '.join(IMPLEMENTATIONS)}"
    x = torch.zeros(1, 1, PROBE_TOKENS, head, device=device, dtype=dtype)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch lists a reason for each backend
            attend_by(implementation, x, x, x)
        return ""
    except Exception as error:  # whatever a library raises: ours runs
        first = (str(error).splitlines() or [""])[0]
        return f"on {device} in {dtype} it raises {type(error).__name__}: {first}"
