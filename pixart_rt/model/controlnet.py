"""The ControlNet-Transformer: copies of blocks that see a control image (arXiv:2310.00426, A.9).

F_i are the model's blocks, which stay as they are; G_i is a copy of F_i that is trained; B_i before
and A_i after it are linears that start at zero. c are the control image's latents (of the same VAE)
through the model's own patch embedder, with positions. M copies:

    parallel   x_{i+1} = F_i(x_i) + A_i(G_i(x_i + B_i(c)))                       i < M
    chained    h_0 = x_1 + B_0(c),   h_{i+1} = G_i(h_i)
               x_{i+2} = F_{i+1}(x_{i+1} + A_i(h_{i+1}))                         i < M

The first is the paper's; the second is the released code's (PixArt-delta, arXiv:2401.05252). In
both, copy i adds to what block i gives. At the start, with A_i and B_i zero, the output is the
model's own to the last bit.

B images, N tokens, D width, R rows as in transformer.py; L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pixart_rt.config import Kernels, ModelConfig, Quality, Weights
from pixart_rt.errors import ConfigError
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.operators import Operators, Rows
from pixart_rt.model.transformer import (
    SHIFT_MSA,
    Block,
    BlockCache,
    Captions,
    CrossText,
    PixArtTransformer,
    local,
)

Text = CrossText | Captions
COPIES = "copies."  # what the names of a ControlNet's own parameters begin with


class ControlBlock(nn.Module):
    """G_i with A_i and, where it sees the control image, B_i."""

    def __init__(self, config: ModelConfig, takes_control: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.block = Block(config)
        self.before_proj = nn.Linear(width, width) if takes_control else None
        self.after_proj = nn.Linear(width, width)

    def forward(
        self, ops: Operators, h: Tensor, x: Tensor, shared: Tensor, text: Text, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h, x and c [R, N, D], shared [R, 6, D]. Returns G(h + B(c)), or G(h), and x + A of it."""
        if self.before_proj is not None:
            h = ops.linear_residual(c, self.before_proj, h, None)
        y = ops.norm(h, Rows(local(self.block.scale_shift_table), shared, SHIFT_MSA))
        h, _ = self.block(ops, h, y, shared, text, None)
        return h, ops.linear_residual(h, self.after_proj, x, None)


class ControlNetTransformer(PixArtTransformer):
    """A PixArtTransformer with copies. Without `control` it is the model it was made of."""

    def __init__(self, config: ModelConfig, controlnet: ControlNetConfig) -> None:
        """Raises ConfigError where the model has fewer blocks than are copied."""
        controlnet.check(config)
        super().__init__(config)
        self.controlnet = controlnet
        self.copies = nn.ModuleList(
            ControlBlock(config, controlnet.takes_control(index))
            for index in range(controlnet.num_copies)
        )

    @classmethod
    def of(cls, model: PixArtTransformer, controlnet: ControlNetConfig) -> ControlNetTransformer:
        """An untrained ControlNet for a model, whose weights it shares; copies have their own."""
        with torch.device("meta"):
            made = cls(model.config, controlnet)
        state = model.state_dict()
        for name, empty in made.copies.state_dict().items():
            index, part, rest = name.split(".", 2)
            if part == "block":
                state[COPIES + name] = state[f"blocks.{index}.{rest}"].clone()
            else:
                like = state["x_embedder.weight"]
                state[COPIES + name] = torch.zeros_like(empty, dtype=like.dtype, device=like.device)
        made.load_state_dict(state, assign=True)
        made.operators = model.operators
        return made.train(model.training)

    def use(
        self,
        kernels: Kernels,
        quality: Quality = Quality.HIGH,
        weights: Weights = Weights.FULL,
    ) -> ControlNetTransformer:
        """As the model's, also for the copies."""
        super().use(kernels, quality, weights)
        self.operators.prepare(self.copies)
        return self

    def forward(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        projected: bool = False,
        control: Tensor | None = None,
    ) -> Tensor:
        """As the model's; control [B, N, C·p·p] are the patches of the control image's latents."""
        if control is None:
            plain = tokens, pos_embed, modulation, prompt_embeds, prompt_mask
            return super().forward(*plain, projected)
        embeds = prompt_embeds.to(self.x_embedder.weight.dtype)
        captions = Captions(embeds if projected else self.y_proj(embeds), prompt_mask)
        text = [captions] * (len(self.blocks) + len(self.copies))
        return self._controlled(tokens, pos_embed, modulation, control, text)

    def denoise(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        rows: Tensor,
        text: Sequence[CrossText],
        outputs: Tensor | None = None,
        cache: BlockCache | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """As the model's; `text` has an entry for each of `text_blocks`, control is of B images.

        Raises ConfigError for a cache with control: the blocks after the first are not all.
        """
        if control is None:
            return super().denoise(tokens, pos_embed, modulation, rows, text, outputs, cache)
        if cache is not None:
            raise ConfigError(
                "a first-block cache is not supported with a ControlNet, which has none; use a "
                "step cache"
            )
        return self._controlled(tokens, pos_embed, modulation, control, text, rows, outputs)

    def _controlled(
        self,
        tokens: Tensor,
        pos_embed: Tensor,
        modulation: Tensor,
        control: Tensor,
        text: Sequence[Text],
        rows: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """Blocks and copies. As in `denoise`, x is of images until block 0 sees text, then rows."""
        x, y, modulation = self._embed(tokens, pos_embed, modulation)
        c, _, _ = self._embed(control, pos_embed, modulation)
        ops, shared = self.operators, modulation[:, :6].contiguous()
        parallel = self.controlnet.variant is ControlVariant.PARALLEL
        h = x
        for index, (block, following) in enumerate(self._chain()):
            joins = index < len(self.copies)
            split = rows if index == 0 else None
            before = x
            x, y = block(ops, x, y, shared, text[index], None if joins else following, split)
            if split is not None:
                before, c = before[split], c[split]
                shared, modulation = shared[split], modulation[split]
            if not joins:
                continue
            if parallel:
                h = before
            elif index == 0:
                h = x
            h, x = self.copies[index](ops, h, x, shared, text[len(self.blocks) + index], c)
            if following is not None:
                y = ops.norm(x, Rows(following, shared, SHIFT_MSA))
        return self.final_layer(ops, x, modulation[:, 6:], outputs)


def text_blocks(model: PixArtTransformer) -> list[Block]:
    """All blocks that see text: the model's, then the copies of a ControlNet."""
    blocks = list(model.blocks)
    if isinstance(model, ControlNetTransformer):
        blocks += [cast(ControlBlock, copy).block for copy in model.copies]
    return [cast(Block, block) for block in blocks]
