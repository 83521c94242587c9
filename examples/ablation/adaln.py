"""The text model with DiT's own modulation, a linear in each block: what adaLN-single replaces.

    [shift, scale, gate]_msa, [shift, scale, gate]_mlp = W_i silu(t_emb) + b_i       every block
    x <- x + gate_msa Attention(LN(x) (1 + scale_msa) + shift_msa)
    x <- x + CrossAttention(x, text)
    x <- x + gate_mlp MLP(LN(x) (1 + scale_mlp) + shift_mlp)

The paper compares it with one linear for all blocks and tables (arXiv:2310.00426, Section 2.3 and
Figure 6). It starts from a DiT without class, exactly and at every timestep. Only for comparisons:
nothing writes or builds it.

B images, N tokens, T text tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.dit import DiTCheckpoint
from pixart_rt.config import ModelConfig
from pixart_rt.model.dit import DiTBlock, DiTFinalLayer
from pixart_rt.model.operators import Operators, Rows, operators
from pixart_rt.model.transformer import (
    GATE_MLP,
    GATE_MSA,
    SHIFT_MLP,
    SHIFT_MSA,
    CrossAttention,
    Mlp,
    PixArtTransformer,
    ScalarEmbedder,
)
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.flops import StepFlops
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.weight_init import initial_value


class AdaLNBlock(DiTBlock):
    """DiT's block with cross-attention between its two halves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cross_attn = CrossAttention(config)

    def with_text(
        self, ops: Operators, x: Tensor, embedded: Tensor, captions: Tensor, mask: Tensor
    ) -> Tensor:
        """x [B, N, D], the timestep's embedding [B, D], captions [B, T, D], mask [B, T]."""
        rows = partial(Rows, *self.adaLN_modulation.rows(embedded))
        attended = self.attn(ops, ops.norm(x, rows(SHIFT_MSA)))
        x = ops.linear_residual(attended, self.attn.proj, x, rows(GATE_MSA))
        cross = self.cross_attn
        attended = cross(ops, x, cross.keys_values(captions), mask)
        x, y = ops.linear_residual_norm(attended, cross.proj, x, None, rows(SHIFT_MLP))
        return ops.linear_residual(
            ops.linear_gelu(y, self.mlp.fc1), self.mlp.fc2, x, rows(GATE_MLP)
        )


class TimestepOnly(nn.Module):
    """The embedding [B, D] of timesteps [B]; image sizes are taken and not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t_embedder = ScalarEmbedder(width)

    def forward(
        self, timestep: Tensor, size: Tensor | None = None, aspect_ratio: Tensor | None = None
    ) -> Tensor:
        return self.t_embedder(timestep)


class AdaLNTransformer(nn.Module):
    """Called as PixArtTransformer is, with what its own `modulator` gives for `modulation`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = nn.Linear(config.token_channels, width)
        self.y_proj = Mlp(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(AdaLNBlock(config) for _ in range(config.num_layers))
        self.final_layer = DiTFinalLayer(config)
        self.modulator = TimestepOnly(width)
        self.operators: Operators = operators()

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
    ) -> Tensor:
        """As PixArtTransformer.forward, with modulation [B, D]. Returns [B, N, p·p·2C]."""
        dtype, ops = self.x_embedder.weight.dtype, self.operators
        wide = torch.promote_types(dtype, torch.float32)
        x = (self.x_embedder(tokens.to(dtype)).to(wide) + pos_embed.to(wide)).to(dtype)
        captions, embedded = self.y_proj(prompt_embeds.to(dtype)), modulation.to(dtype)
        for block in self.blocks:
            x = cast(AdaLNBlock, block).with_text(ops, x, embedded, captions, prompt_mask)
        return self.final_layer(ops, x, embedded)


def from_dit(dit: DiTCheckpoint, config: ModelConfig, seed: int = 0) -> AdaLNTransformer:
    """The DiT without class; what it has not starts as in re-parameterisation."""
    model, random = AdaLNTransformer(config), torch.Generator().manual_seed(seed)
    state = {
        name: dit.state[known]
        if (known := name.removeprefix("modulator.")) in dit.state
        else initial_value(name, each.shape, random)
        for name, each in model.named_parameters()
    }
    model.load_state_dict(state)
    return model


class AdaLNObjective(TextObjective):
    """TextObjective of an AdaLNTransformer; its FLOPs are not counted."""

    def __init__(
        self,
        model: AdaLNTransformer,
        diffusion: GaussianDiffusion,
        null: NullText,
        text_dropout: float,
        *,
        timestep_shift: float = 1.0,
    ) -> None:
        as_text = cast(PixArtTransformer, model)
        super().__init__(as_text, diffusion, null, text_dropout, timestep_shift=timestep_shift)

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops | None:  # type: ignore[override]
        return None
