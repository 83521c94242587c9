"""The class-conditional DiT (Peebles & Xie, arXiv:2212.09748) that PixArt-alpha starts from.

Pixel dependency, the first stage of training (arXiv:2310.00426, Section 2.2). A block is ours
without text, with modulation of its own (adaLN-Zero) instead of a table:
    c = t_embedder(t) + label[y]
    [shift, scale, gate]_msa, [shift, scale, gate]_mlp = W silu(c) + b
    x <- x + gate_msa Attention(LN(x) (1 + scale_msa) + shift_msa)
    x <- x + gate_mlp MLP(LN(x) (1 + scale_mlp) + shift_mlp)
W silu(c) is what an operator calls `shared` and b is its `table`, so that blocks run on the
operators of the text model (pixart_rt/model/operators.py).

B images, N tokens, D width, L blocks. Parameters have the names of facebookresearch/DiT, but for
x_embedder, which is a linear over patch tokens here (dit_checkpoint.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt.config import Kernels, ModelConfig, Quality
from pixart_rt.errors import ConfigError
from pixart_rt.model.operators import Operators, Rows, operators
from pixart_rt.model.transformer import (
    GATE_MLP,
    GATE_MSA,
    SHIFT_MLP,
    SHIFT_MSA,
    Mlp,
    ScalarEmbedder,
    SelfAttention,
)

EMBEDDING_STD = 0.02  # of the timestep's and the labels' embeddings at the start of training


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """The shape of a DiT. The default is XL/2 at 256 pixels for ImageNet."""

    num_classes: int = 1000  # without the null label, which is one more row of the table
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    sample_size: int = 32  # latent pixels per side: resolution / 8

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be positive, got {self.num_classes}")
        self.backbone()  # refuses what a PixArt transformer would refuse

    def backbone(self) -> ModelConfig:
        """The same shape as a text model's; DiT's positions are 0, 1, 2... along each side."""
        return ModelConfig(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch_size=self.patch_size,
            sample_size=self.sample_size,
            interpolation_scale=1.0,
            micro_conditioning=False,
        )

    @property
    def null_label(self) -> int:
        """The label of dropped classes: the last row of the table."""
        return self.num_classes


class Modulation(nn.Sequential):
    """SiLU and a linear from the conditioning to an operator's rows; `1` is DiT's name for it."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, rows * width))
        self.num_rows = rows

    @property
    def linear(self) -> nn.Linear:
        last = self[1]
        assert isinstance(last, nn.Linear)
        return last

    def rows(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The conditioning [B, D] to (table [R, D], shared [B, R, D]); their sum modulates."""
        shared = F.linear(F.silu(embedded), self.linear.weight)
        wide = torch.promote_types(shared.dtype, torch.float32)
        shape = (self.num_rows, -1)
        return self.linear.bias.unflatten(0, shape), shared.to(wide).unflatten(1, shape)


class DiTBlock(nn.Module):
    """One block; see the formula at the top of the file.

    Unlike the text model's it normalizes its own input: its modulation is large and its own, so a
    block that is sharded (FSDP) is all that must be gathered to run it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = SelfAttention(config)
        self.mlp = Mlp(width, 4 * width, width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, ops: Operators, x: Tensor, embedded: Tensor) -> Tensor:
        """x [B, N, D] and the conditioning [B, D]."""
        rows = partial(Rows, *self.adaLN_modulation.rows(embedded))
        attended = self.attn(ops, ops.norm(x, rows(SHIFT_MSA)))
        x, y = ops.linear_residual_norm(
            attended, self.attn.proj, x, rows(GATE_MSA), rows(SHIFT_MLP)
        )
        return ops.linear_residual(
            ops.linear_gelu(y, self.mlp.fc1), self.mlp.fc2, x, rows(GATE_MLP)
        )


class DiTFinalLayer(nn.Module):
    """LayerNorm, modulation by its own linear, projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.adaLN_modulation = Modulation(width, 2)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)

    def forward(self, ops: Operators, x: Tensor, embedded: Tensor) -> Tensor:
        """x [B, N, D] and the conditioning [B, D]."""
        return self.linear(ops.ln_modulate(x, Rows(*self.adaLN_modulation.rows(embedded), 0)))


class LabelEmbedder(nn.Module):
    """A label to a vector; the last row stands for dropped classes."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class DiT(nn.Module):
    """Patch tokens, positions, timestep and label to the predicted noise (and variance)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone()
        width = backbone.hidden_size
        self.x_embedder = nn.Linear(backbone.token_channels, width)
        self.t_embedder = ScalarEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(DiTBlock(backbone) for _ in range(config.num_layers))
        self.final_layer = DiTFinalLayer(backbone)
        self.operators: Operators = operators()

    def use(self, kernels: Kernels, quality: Quality = Quality.HIGH) -> DiT:
        """Switch all blocks between the reference and the fused operators; returns self."""
        self.operators = operators(kernels, quality)
        self.operators.prepare(self.blocks)
        return self

    def forward(
        self, tokens: Tensor, pos_embed: Tensor, timestep: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Returns [B, N, p·p·out_channels], each patch channel last.

        tokens [B, N, C·p·p]; pos_embed [1 or B, N, D] float32; timestep [B]; labels [B] integers
        in 0..num_classes, the last of which is the null label. Without labels the class term is
        left out of c altogether: this is what re-parameterisation keeps (reparameterize.py).
        """
        dtype = self.x_embedder.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x = (self.x_embedder(tokens.to(dtype)).to(wide) + pos_embed.to(wide)).to(dtype)
        embedded = self.t_embedder(timestep)
        if labels is not None:
            embedded = embedded + self.y_embedder(labels)
        for block in self.blocks:
            x = block(self.operators, x, embedded)
        return self.final_layer(self.operators, x, embedded)


def initialize_dit(model: DiT, generator: torch.Generator | None = None) -> DiT:
    """DiT's start (Section 3.2, adaLN-Zero): every block the identity, the output zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    for embedding in (*model.t_embedder.mlp, model.y_embedder.embedding_table):
        if isinstance(embedding, nn.Linear | nn.Embedding):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD, generator=generator)
    zero = [module.linear for module in model.modules() if isinstance(module, Modulation)]
    for linear in (*zero, model.final_layer.linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model
