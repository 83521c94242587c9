"""The text side of all cross-attentions, computed once for each prompt and kept.

Captions are projected, then every block's keys and values are made of them; they are the same at
every denoising step. For a prompt with one visible token there is also the vector that each block
adds at every image token (the constant form of kernels/cross_attention.py).

B prompts, T text tokens, C caption channels, D width, H heads, K head width, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixart_rt.config import ModelConfig
from pixart_rt.errors import BundleError
from pixart_rt.kernels.cross_attention import (
    Absorbed,
    Form,
    absorb,
    choose_form,
    cross_attention_constant,
)
from pixart_rt.model.controlnet import text_blocks
from pixart_rt.model.operators import refuse_adapters
from pixart_rt.model.transformer import CrossAttention, Mlp, PixArtTransformer

TEXT_SIDE = "text_side.safetensors"  # in a bundle


@dataclass(frozen=True, slots=True)
class PromptText:
    """What the blocks see of B prompts."""

    kv: Tensor  # [L, B, T, 2, H, K]
    mask: Tensor  # [B, T] boolean, True at visible tokens
    constant: Tensor | None  # [L, B, 1, D] if every prompt has one visible token
    num_tokens: int  # visible, of the longest prompt

    @property
    def num_bytes(self) -> int:
        """Of the tensors, by which a cache is bounded."""
        constant = 0 if self.constant is None else self.constant.nbytes
        return self.kv.nbytes + self.mask.nbytes + constant

    def __getitem__(self, rows: slice) -> PromptText:
        constant = None if self.constant is None else self.constant[:, rows]
        return PromptText(self.kv[:, rows], self.mask[rows], constant, self.num_tokens)

    @staticmethod
    def cat(parts: Sequence[PromptText]) -> PromptText:
        """Prompts one after the other."""
        constants = [part.constant for part in parts if part.constant is not None]
        return PromptText(
            torch.cat([part.kv for part in parts], dim=1),
            torch.cat([part.mask for part in parts]),
            torch.cat(constants, dim=1) if len(constants) == len(parts) else None,
            max(part.num_tokens for part in parts),
        )


class _CrossText(nn.Module):
    """The part of a block that sees text; the names are those of a whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config)


class TextSide(nn.Module):
    """The caption projection and the cross-attention weights of a transformer, and what they make.

    Its state is a subset of the transformer's, under the same names; the `num_copies` copies of a
    ControlNet are further blocks (model/controlnet.py). L counts both.
    """

    def __init__(self, config: ModelConfig, num_copies: int = 0) -> None:
        super().__init__()
        self.config = config
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)
        count = config.num_layers + num_copies
        self.blocks = nn.ModuleList(_CrossText(config) for _ in range(count))

    @classmethod
    def of(cls, model: PixArtTransformer) -> TextSide:
        """The text side of a model, sharing its weights.

        Raises ConfigError for a model with adapters: its forms read weights, not modules.
        """
        refuse_adapters(model, "sampling")
        blocks = text_blocks(model)
        with torch.device("meta"):
            side = cls(model.config, len(blocks) - model.config.num_layers)
        side.y_proj = model.y_proj
        for mine, theirs in zip(side.blocks, blocks, strict=True):
            mine.cross_attn = theirs.cross_attn
        return side

    @classmethod
    def load(cls, path: Path, config: ModelConfig, num_copies: int = 0) -> TextSide:
        """From the bundle's file. Raises BundleError if it is missing or damaged."""
        with torch.device("meta"):
            side = cls(config, num_copies)
        try:
            side.load_state_dict(load_file(path), assign=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"{path} is damaged ({reason}); build the bundle again") from error
        return side.eval().requires_grad_(False)

    def forward(self, prompt_embeds: Tensor, mask: Tensor, num_tokens: int) -> PromptText:
        """prompt_embeds [B, T, C], mask [B, T] boolean with at most `num_tokens` True in a row."""
        captions = self.y_proj(prompt_embeds.to(self.y_proj.fc1.weight.dtype))
        kv = torch.stack([cross.keys_values(captions) for cross in self._cross()])
        constant = None
        if choose_form(num_tokens) is Form.CONSTANT:
            vectors = [
                cross_attention_constant(each, mask, cross.proj.weight, cross.proj.bias)
                for each, cross in zip(kv, self._cross(), strict=True)
            ]
            constant = torch.stack(vectors)
        return PromptText(kv, mask, constant, num_tokens)

    def absorbed(self, text: PromptText) -> Absorbed | None:
        """The absorbed form of all blocks, where the prompts are short enough for it to be less
        work, else None. Its tensors have L in front of the shapes of `absorb`.
        """
        form = choose_form(text.num_tokens)
        if form is Form.STANDARD:
            return None
        length = max(form.value, Form.ABSORBED_16.value)  # also for a lone token
        blocks = [
            absorb(
                kv,
                text.mask,
                *(cross.q_linear.weight, cross.q_linear.bias),
                *(cross.proj.weight, cross.proj.bias),
                length,
            )
            for kv, cross in zip(text.kv, self._cross(), strict=True)
        ]
        return Absorbed(*(torch.stack(tensors) for tensors in zip(*blocks, strict=True)))

    def _cross(self) -> list[CrossAttention]:
        return [cast(_CrossText, block).cross_attn for block in self.blocks]
