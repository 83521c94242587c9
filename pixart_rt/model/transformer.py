"""The PixArt transformer in token space (arXiv:2310.00426, Section 2.3 and Figure 4).

One definition for training, torch.compile and export. A block is
    x ← x + gate_msa · Attention(LN(x)·(1 + scale_msa) + shift_msa)
    x ← x + CrossAttention(x, text)                                  no norm, no gate
    x ← x + gate_mlp · MLP(LN(x)·(1 + scale_mlp) + shift_mlp)
where the six vectors are the image's shared modulation plus the block's own table (adaLN-single).

B images, N tokens, T text tokens, D width, H heads, K head width, C caption channels, L blocks;
R rows: the images, or with guidance two rows for each, that differ only in their text.
Numbers of images, rows and tokens are the only dynamic sizes. Parameters have the names of the
original checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt.config import Kernels, ModelConfig, Quality, Weights
from pixart_rt.kernels.cross_attention import (
    Absorbed,
    add_cross_attention_absorbed,
    cross_attention_absorbed,
)
from pixart_rt.kernels.launch import exporting
from pixart_rt.model.embeddings import FREQUENCY_CHANNELS, sinusoid
from pixart_rt.model.operators import Normed, Operators, Rows, operators

MODULATION_ROWS = 7  # shift, scale, gate of attention; of the MLP; the embedding of the last layer
SHIFT_MSA, GATE_MSA, SHIFT_MLP, GATE_MLP = 0, 2, 3, 5  # rows; each scale follows its shift


_DISTRIBUTED: tuple[type[Tensor], ...] = ()


def read_locally(kind: type[Tensor]) -> None:
    """Make `local` take tables of this class: DTensor, whose import costs inference a second.

    Called by what distributes a model. torch.compile follows isinstance, not hasattr.
    """
    global _DISTRIBUTED
    _DISTRIBUTED = (kind,)


def local(table: Tensor) -> Tensor:
    """A block's table. One that is replicated over ranks (training/distributed.py) is read as this
    rank's tensor: the end of a block reads the next one's, which FSDP has not gathered yet."""
    return cast(Any, table).to_local() if isinstance(table, _DISTRIBUTED) else table


class Mlp(nn.Module):
    """Two linears with GELU (tanh form) between; also projects the captions."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Attention among image tokens, with packed query, key and value; `proj` is the block's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, ops: Operators, y: Normed) -> Tensor:
        return ops.self_attention(ops.linear(y, self.qkv).unflatten(-1, (3, *self.heads)))


class CrossText(NamedTuple):
    """What one block's cross-attention sees of the text (forms: kernels/cross_attention.py).

    Rows whose prompt has one visible token come first: each gets one vector for all its image
    tokens. The other rows have keys and values.
    """

    attended: Tensor | Absorbed  # kv [C, T, 2, H, K], or what `absorb` made of it
    mask: Tensor  # [C, T] boolean, True to attend
    constant: Tensor | None = None  # [U, 1, D] with U + C = R


class Captions(NamedTuple):
    """Text before a block's own projection to keys and values, as training has it."""

    embeds: Tensor  # [B, T, D], of y_proj
    mask: Tensor  # [B, T] boolean


class CrossAttention(nn.Module):
    """Attention of image tokens [R, N, D] to text."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def keys_values(self, captions: Tensor) -> Tensor:
        """Projected captions [B, T, D] to [B, T, 2, H, K]: the same at every step."""
        return self.kv_linear(captions).unflatten(-1, (2, *self.heads))

    def forward(self, ops: Operators, x: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """The standard form, without `proj`."""
        q = ops.linear(x, self.q_linear).unflatten(-1, self.heads)
        return ops.cross_attention(q, kv, mask)

    def projected(self, ops: Operators, x: Tensor, text: CrossText) -> Tensor:
        """Any form, with `proj`: what is added to x."""
        constant = text.constant
        rows = x if constant is None else x[constant.shape[0] :]
        if isinstance(text.attended, Absorbed):
            out = cross_attention_absorbed(rows, *text.attended)
        else:
            out = ops.linear(self(ops, rows, text.attended, text.mask), self.proj)
        if constant is None:
            return out
        return torch.cat([constant.to(out.dtype).expand(-1, x.shape[1], -1), out])

    def add_(self, ops: Operators, x: Tensor, text: CrossText) -> None:
        """x += `projected`, without a tensor of all rows that holds it: each form adds to its own.

        Not differentiable, and x must be the caller's alone.
        """
        rows = x
        if text.constant is not None:
            count = text.constant.shape[0]
            x[:count].add_(text.constant)
            rows = x[count:]
        if isinstance(text.attended, Absorbed):
            add_cross_attention_absorbed(rows, *text.attended)
        else:
            rows.add_(ops.linear(self(ops, rows, text.attended, text.mask), self.proj))


class Block(nn.Module):
    """One transformer block; see the formula at the top of the file.

    It takes x already normalized and modulated for its attention, and gives x so for the next
    block's: the end of one block and the beginning of the next are one operator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(
        self,
        ops: Operators,
        x: Tensor,
        y: Normed,
        shared: Tensor,
        text: CrossText | Captions,
        following: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Normed | None]:
        """x [R, N, D], y its norm, shared [R, 6, D], `following` the next block's table [6, D].

        With rows [R], x, y and shared are of B images until the text is seen, and of rows from
        there on: row r is image rows[r]. Returns x and, unless this is the last block, its norm
        for the next.
        """
        if isinstance(text, Captions):  # here, where FSDP has gathered the block's weights
            text = CrossText(self.cross_attn.keys_values(text.embeds), text.mask)
        at = partial(Rows, local(self.scale_shift_table))
        x = ops.linear_residual(self.attn(ops, y), self.attn.proj, x, at(shared, GATE_MSA))
        if rows is not None:
            x, shared = x[rows], shared[rows]
        cross, norm = self.cross_attn, at(shared, SHIFT_MLP)
        if text.constant is None and isinstance(text.attended, Tensor):
            attended = cross(ops, x, text.attended, text.mask)
            x, y = ops.linear_residual_norm(attended, cross.proj, x, None, norm)
        elif exporting() or (torch.is_grad_enabled() and x.requires_grad):
            x, y = ops.residual_norm(cross.projected(ops, x, text), x, norm)
        else:  # x is of this block: no other variable names it
            cross.add_(ops, x, text)
            y = ops.norm(x, norm)
        hidden = ops.linear_gelu(y, self.mlp.fc1)
        gate = at(shared, GATE_MLP)
        if following is None:
            return ops.linear_residual(hidden, self.mlp.fc2, x, gate), None
        norm = Rows(following, shared, SHIFT_MSA)
        return ops.linear_residual_norm(hidden, self.mlp.fc2, x, gate, norm)


class ScalarEmbedder(nn.Module):
    """A float32 scalar [B] to a vector [B, width]: sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, values: Tensor) -> Tensor:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(sinusoid(values).to(first.weight.dtype))


class Modulator(nn.Module):
    """Timestep, image size and aspect ratio to the modulation of all blocks (adaLN-single).

    Small, and the same for every token and block, so it runs outside the engines in float32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.t_embedder = ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.micro_conditioning = config.micro_conditioning
        if config.micro_conditioning:
            self.csize_embedder = ScalarEmbedder(width // 3)
            self.ar_embedder = ScalarEmbedder(width // 3)

    def forward(
        self, timestep: Tensor, size: Tensor | None = None, aspect_ratio: Tensor | None = None
    ) -> Tensor:
        """timestep [B], size [B, 2] (height, width in pixels), aspect_ratio [B] (height / width).

        All float32, the last two only with micro-conditioning. Returns [B, 7, D]: the six vectors
        of the blocks and, last, the embedding that modulates the final layer.
        """
        embedded = self.t_embedder(timestep)
        if self.micro_conditioning:
            if size is None or aspect_ratio is None:
                raise ValueError("a micro-conditioned model needs size and aspect_ratio")
            sizes = self.csize_embedder(size.flatten()).unflatten(0, (-1, 2)).flatten(1)
            embedded = embedded + torch.cat([sizes, self.ar_embedder(aspect_ratio)], dim=1)
        shared = self.t_block(embedded).unflatten(-1, (MODULATION_ROWS - 1, -1))
        return torch.cat([shared, embedded[:, None]], dim=1)


class FinalLayer(nn.Module):
    """LayerNorm, modulation by its own table and the raw embedding, projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)

    def forward(
        self, ops: Operators, x: Tensor, embedded: Tensor, outputs: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D] and the embedding [B, 1, D] of the timestep, the same for both rows.

        `outputs` are the rows of the projection that are wanted, by default all.
        """
        shared = embedded.expand(-1, 2, -1).contiguous()
        x = ops.ln_modulate(x, Rows(self.scale_shift_table, shared, 0))
        if outputs is None:
            return self.linear(x)
        return F.linear(x, self.linear.weight[outputs], self.linear.bias[outputs])


class BlockCache(Protocol):
    """Whether the blocks after the first may be left out of a call (step_cache.py)."""

    def reused(self, before: Tensor, after: Tensor) -> Tensor | None:
        """x [R, N, D] after the last block, for x before and after the first; None: compute it."""
        ...

    def keep(self, last: Tensor) -> None:
        """x [R, N, D] after the last block, of a call that computed it."""
        ...


class PixArtTransformer(nn.Module):
    """Patch tokens, positions, modulation and text to the predicted noise (and variance)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = nn.Linear(config.token_channels, width)
        self.y_proj = Mlp(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)
        self.modulator = Modulator(config)
        self.operators: Operators = operators()

    def use(
        self,
        kernels: Kernels,
        quality: Quality = Quality.HIGH,
        weights: Weights = Weights.FULL,
    ) -> PixArtTransformer:
        """Switch all blocks between the reference and the fused operators; returns self.

        FAST quantizes the weights of the blocks' linears to fp8 here, once; do it after the last
        change of dtype. `weights` says what model/quantize.py made of them. Raises ConfigError
        where `quality` needs other kernels.
        """
        self.operators = operators(kernels, quality, weights)
        self.operators.prepare(self.blocks)
        return self

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        projected: bool = False,
    ) -> Tensor:
        """The core. Returns [B, N, p·p·out_channels], each patch channel last.

        tokens [B, N, C·p·p]; pos_embed [1 or B, N, D] float32; modulation [B, 7, D] float32 from
        `self.modulator`; prompt_embeds [B, T, C]; prompt_mask [B, T] boolean, True to attend.
        With `projected` the embeddings are what `self.y_proj` made of them, [B, T, D].
        """
        x, y, modulation = self._embed(tokens, pos_embed, modulation)
        embeds = prompt_embeds.to(x.dtype)
        captions = Captions(embeds if projected else self.y_proj(embeds), prompt_mask)
        ops, shared = self.operators, modulation[:, :6].contiguous()
        for block, following in self._chain():
            x, y = block(ops, x, y, shared, captions, following)
        return self.final_layer(ops, x, modulation[:, 6:])

    def denoise(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        rows: Tensor,
        text: Sequence[CrossText],
        outputs: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """`forward` without what is the same at every step or for both halves of guidance.

        rows [R] are the images' indices: row r is image rows[r] with the r-th text. Until the first
        block's cross-attention rows of one image are equal, and computed once. `text` has an entry
        for each block (model/text_kv.py). Returns [R, N, outputs], by default all. A `cache` may
        stand in for the blocks after the first.
        """
        x, y, modulation = self._embed(tokens, pos_embed, modulation)
        ops, shared = self.operators, modulation[:, :6].contiguous()
        for index, (block, following) in enumerate(self._chain()):
            first = index == 0
            before = x[rows] if first and cache is not None else None
            x, y = block(ops, x, y, shared, text[index], following, rows if first else None)
            if first:
                shared, modulation = shared[rows], modulation[rows]
            if cache is not None and before is not None:
                reused = cache.reused(before, x)
                if reused is not None:
                    return self.final_layer(ops, reused, modulation[:, 6:], outputs)
        if cache is not None:
            cache.keep(x)
        return self.final_layer(ops, x, modulation[:, 6:], outputs)

    def _embed(
        self, tokens: Tensor, pos_embed: Tensor, modulation: Tensor
    ) -> tuple[Tensor, Normed, Tensor]:
        """x [B, N, D], its norm for the first block, and the modulation in float32 or wider."""
        dtype = self.x_embedder.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        modulation = modulation.to(wide)
        x = (self.x_embedder(tokens.to(dtype)).to(wide) + pos_embed.to(wide)).to(dtype)
        table = local(cast(Block, self.blocks[0]).scale_shift_table)
        shared = modulation[:, :6].contiguous()
        return x, self.operators.norm(x, Rows(table, shared, SHIFT_MSA)), modulation

    def _chain(self) -> Iterator[tuple[Block, Tensor | None]]:
        """Each block with the table of the one that follows."""
        blocks = [cast(Block, block) for block in self.blocks]
        tables = [local(block.scale_shift_table) for block in blocks]
        return zip(blocks, [*tables[1:], None], strict=True)
