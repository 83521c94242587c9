"""Softmax attention, with an optional mask over keys: softmax(q·kᵀ/√K)·v.

B images, H heads, N queries, T keys, K head width (72 in PixArt). q is [B, H, N, K], k and v are
[B, H, T, K], key_mask is [B, T] boolean, True where a key may be seen; every row needs one.
"""

import torch.nn.functional as F
from torch import Tensor


def attention_ref(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's own scaled dot product attention; [B, H, N, K]."""
    # The mask stays [B, 1, 1, T]: broadcast inside, never materialised per head or per query.
    bias = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
