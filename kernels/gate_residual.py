"""Gated residual: x + gate·y, the end of both adaLN branches of a block.

B images, N tokens, D width. x and y are [B, N, D]; gate is [B, D] in float32.
"""

import torch
from torch import Tensor


def gate_residual_ref(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The formula in plain PyTorch, computed in float32 or wider; the result has x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate[:, None] * y.to(wide)).to(x.dtype)
