"""The embeddings of prompts, as the text encoder or a caller gives them.

B prompts, T text tokens of the model, C caption channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """embeds [B, T, C] float32; mask [B, T] boolean, True at tokens; tokens of each on the host.

    Embeddings of padding are the text encoder's, or zeros where it did not run that far.
    """

    embeds: Tensor
    mask: Tensor
    num_tokens: tuple[int, ...]
    texts: tuple[str | None, ...] = ()  # names for caches; None where they do not say it all

    def __post_init__(self) -> None:
        if not self.texts:
            object.__setattr__(self, "texts", (None,) * len(self.num_tokens))

    @property
    def num_bytes(self) -> int:
        """Of the tensors, by which a cache is bounded."""
        return self.embeds.nbytes + self.mask.nbytes

    def row(self, index: int) -> PromptEmbeds:
        """One prompt, which owns its tensors: a view would keep its whole batch in memory."""
        embeds, mask = self.embeds[index : index + 1], self.mask[index : index + 1]
        if len(self.num_tokens) > 1:
            embeds, mask = embeds.clone(), mask.clone()
        return PromptEmbeds(embeds, mask, (self.num_tokens[index],), (self.texts[index],))

    def rows(self) -> list[PromptEmbeds]:
        """Each prompt by itself."""
        return [self.row(index) for index in range(len(self.num_tokens))]

    def named(self, *texts: str | None) -> PromptEmbeds:
        """The same embeddings under other names."""
        return PromptEmbeds(self.embeds, self.mask, self.num_tokens, texts)

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Prompts one after the other."""
        return PromptEmbeds(
            torch.cat([part.embeds for part in parts]),
            torch.cat([part.mask for part in parts]),
            tuple(count for part in parts for count in part.num_tokens),
            tuple(text for part in parts for text in part.texts),
        )


def given_embeds(
    name: str, embeds: Tensor, mask: Tensor | None, config: ModelConfig, device: torch.device
) -> PromptEmbeds:
    """Embeddings that a caller passed, on the device. Raises ConfigError where they do not fit.

    name: of the argument, for the error.
    """
    if mask is None or mask.shape != embeds.shape[:2]:
        raise ConfigError(
            f"{name} {list(embeds.shape)} came with "
            f"{'no' if mask is None else f'the {list(mask.shape)}'} attention mask; embeddings "
            "[B, T, C] need their mask [B, T]"
        )
    expected = (config.max_text_tokens, config.caption_channels)
    if embeds.shape[1:] != expected:
        raise ConfigError(
            f"{name} are {list(embeds.shape)}, the model takes [B, {expected[0]}, {expected[1]}]"
        )
    mask = mask.bool()
    counts = tuple(mask.sum(1).tolist())
    return PromptEmbeds(embeds.float().to(device), mask.to(device), counts)
