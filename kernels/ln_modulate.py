"""LayerNorm and adaLN-single modulation: y = layer_norm(x)·(1 + scale) + shift.

PixArt-alpha (arXiv:2310.00426), Section 2.3: one vector per image, shared by all blocks, plus a
table per block give shift and scale. B images, N tokens, D width. x and y are [B, N, D]; shift and
scale are [B, D] in float32. LayerNorm has no weights and eps 1e-6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def ln_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The formula in plain PyTorch, computed in float32 or wider; y has x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)
