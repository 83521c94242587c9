"""Which operators' results activation checkpointing keeps: matrix products and attention.

They are most of a block's time. Elementwise operators, the ones that normalize and modulate among
them, are cheap to run again in the backward, and their outputs are most of a block's memory.

    checkpoint(block, ..., use_reentrant=False,
               context_fn=partial(create_selective_checkpoint_contexts, policy))
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from pixart_rt.kernels import attention, cross_attention, linear  # registers the operators

_ATEN = torch.ops.aten
SAVED = frozenset({
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.linear.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    *(each.default for file in (attention, cross_attention, linear) for each in file.PRODUCTS),
})  # fmt: skip


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of SAVED, run everything else again."""
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
