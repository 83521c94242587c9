"""The PixArt transformer in token space (arXiv:2310.00426, Section 2.3 and Figure 4).

One definition for training, torch.compile and export. A block is
    x ← x + gate_msa · Attention(LN(x)·(1 + scale_msa) + shift_msa)
    x ← x + CrossAttention(x, text)                                  no norm, no gate
    x ← x + gate_mlp · MLP(LN(x)·(1 + scale_mlp) + shift_mlp)
where the six vectors are the image's shared modulation plus the block's own table (adaLN-single).

B images, N tokens, T text tokens, D width, H heads, K head width, C caption channels, L blocks.
B and N are the only dynamic sizes. Parameters have the names of the original checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt import ops
from pixart_rt.config import ModelConfig
from pixart_rt.model.conditioning import FREQUENCY_CHANNELS, sinusoid

MODULATION_ROWS = 7  # shift, scale, gate of attention; of the MLP; the embedding of the last layer


class Mlp(nn.Module):
    """Two linears with GELU (tanh form) between; also projects the captions."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Attention among image tokens, with packed query, key and value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(ops.attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of image tokens [B, N, D] to text [B, T, D] where prompt_mask [B, T] is True."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, text: Tensor, prompt_mask: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, self.heads).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, *self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(ops.attention(q, k, v, prompt_mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block; see the formula at the top of the file."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, prompt_mask: Tensor) -> Tensor:
        table = self.scale_shift_table.to(modulation.dtype) + modulation[:, :6]  # [B, 6, D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
        x = ops.gate_residual(x, self.attn(ops.ln_modulate(x, shift_msa, scale_msa)), gate_msa)
        x = x + self.cross_attn(x, text, prompt_mask)
        return ops.gate_residual(x, self.mlp(ops.ln_modulate(x, shift_mlp, scale_mlp)), gate_mlp)


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

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        table = self.scale_shift_table.to(embedded.dtype) + embedded[:, None]
        shift, scale = table.unbind(1)
        return self.linear(ops.ln_modulate(x, shift, scale))


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

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
    ) -> Tensor:
        """The core. Returns [B, N, p·p·out_channels], each patch channel last.

        tokens [B, N, C·p·p]; pos_embed [1 or B, N, D] float32; modulation [B, 7, D] float32 from
        `self.modulator`; prompt_embeds [B, T, C]; prompt_mask [B, T] boolean, True to attend.
        """
        dtype = self.x_embedder.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        modulation = modulation.to(wide)
        x = (self.x_embedder(tokens.to(dtype)).to(wide) + pos_embed.to(wide)).to(dtype)
        text = self.y_proj(prompt_embeds.to(dtype))
        for block in self.blocks:
            x = block(x, modulation, text, prompt_mask)
        return self.final_layer(x, modulation[:, 6])
