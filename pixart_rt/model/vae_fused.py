"""The fused form of a diffusers VAE decoder: GroupNorm with SiLU, attention in query chunks.

    softmax(q·kᵀ·scale)·v, some rows of q at a time

The mid-block attends among all N = h·w latent pixels with one head as wide as the block (512), too
wide for any flash kernel. Of its N×N scores, 1 GB in float32 at 1024 px, no more than SCORE_BYTES
exist at once; every row is whole, so the result is exact.

B images, N pixels, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixart_rt.kernels.group_norm_silu import group_norm_silu

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

SCORE_BYTES = 64 << 20  # of float32 scores at once: a few thousand rows at 512 px, 1024 at 1024 px

Swap = tuple[nn.Module, str, nn.Module]  # a parent, the name of a child, what to put there


class FusedGroupNorm(nn.Module):
    """A GroupNorm with the SiLU that follows it, or alone, as one operator."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__()
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]; the result has its shape, dtype and layout."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of q [B, N, K] to k and v [B, M, K], in float32 or wider between the products."""
    wide = torch.promote_types(q.dtype, torch.float32)
    mixed = q.is_cuda and q.dtype != wide  # half-precision factors and float32 scores
    if not mixed:
        q, k = q.to(wide), k.to(wide)
    rows = max(1, SCORE_BYTES // (len(q) * k.shape[1] * wide.itemsize))
    out = v.new_empty(len(q), q.shape[1], v.shape[2])
    for start in range(0, q.shape[1], rows):
        chunk = q[:, start : start + rows]
        scores = torch.bmm(chunk, k.mT, wide) if mixed else torch.bmm(chunk, k.mT)
        weights = scores.mul_(scale).softmax(-1).to(v.dtype)
        out[:, start : start + rows] = torch.bmm(weights, v)
    return out


@torch.library.custom_op("pixart_rt::chunked_attention", mutates_args=())
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attend_in_chunks` as one operator: torch.compile must not unroll its loop. No gradients."""
    return attend_in_chunks(q, k, v, scale)


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


class ChunkedAttention(nn.Module):
    """diffusers' Attention among the pixels of an image, its layers under the same names."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, attention.scale
        self.divisor = attention.rescale_output_factor
        self.group_norm = FusedGroupNorm(attention.group_norm, silu=False)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """x [B, C, h, w] to the same shape; channels-last stays channels-last without a copy.

        temb is what diffusers' blocks pass on; a VAE has none.
        """
        pixels = self.group_norm(x).flatten(2).mT  # [B, N, C]
        q, k, v = (
            layer(pixels).unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer in (self.to_q, self.to_k, self.to_v)
        )  # each [B·H, N, K]
        out = chunked_attention(q, k, v, self.scale)
        out = out.unflatten(0, (len(x), self.heads)).transpose(1, 2).flatten(2)
        out = self.to_out[0](out).mT.unflatten(2, x.shape[2:])
        return (out + x) / self.divisor


def fused_modules(decoder: nn.Module) -> Iterator[Swap]:
    """What takes the place of which modules of a decoder; all parameters are shared.

    What is not as PixArt's VAEs have it (another activation, another norm) is left out.
    """
    from diffusers.models.attention_processor import Attention  # loaded: the decoder is diffusers'
    from diffusers.models.resnet import ResnetBlock2D

    for block in decoder.modules():
        if isinstance(block, ResnetBlock2D) and _norms_then_silu(block):
            yield block, "norm1", FusedGroupNorm(block.norm1, silu=True)
            yield block, "norm2", FusedGroupNorm(block.norm2, silu=True)
            yield block, "nonlinearity", nn.Identity()
        for name, child in block.named_children():
            if isinstance(child, Attention) and _is_plain(child):
                yield block, name, ChunkedAttention(child)
    if isinstance(decoder.conv_norm_out, nn.GroupNorm) and isinstance(decoder.conv_act, nn.SiLU):
        yield decoder, "conv_norm_out", FusedGroupNorm(decoder.conv_norm_out, silu=True)
        yield decoder, "conv_act", nn.Identity()


def _norms_then_silu(block: ResnetBlock2D) -> bool:
    """Whether SiLU follows both norms of a block directly, and no time enters."""
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.time_emb_proj is None
        and block.time_embedding_norm != "scale_shift"
    )


def _is_plain(attention: Attention) -> bool:
    """Whether an attention is GroupNorm, three linears, one more and the residual."""
    extras = (attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    return (
        isinstance(attention.group_norm, nn.GroupNorm)
        and attention.residual_connection
        and not any(extras)
    )


def swap(swaps: list[Swap]) -> list[Swap]:
    """Put every module in its place; the list that undoes it."""
    before = [(parent, name, parent.get_submodule(name)) for parent, name, _ in swaps]
    for parent, name, module in swaps:
        setattr(parent, name, module)
    return before
