"""Prompts to embeddings: tokenizer, text encoder and a cache; and what the unconditional half sees.

B prompts, T text tokens, C caption channels.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_rt.backends.base import Component
from pixart_rt.config import CfgNull
from pixart_rt.errors import BundleError
from pixart_rt.model.captions import PromptTokenizer

CACHED_PROMPTS = 256  # XL: 2 MB each


@dataclass(frozen=True, slots=True)
class Encoded:
    """embeds [B, T, C] float32; mask [B, T] boolean, True at tokens."""

    embeds: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Encoded:
        return Encoded(self.embeds[rows], self.mask[rows])

    @staticmethod
    def cat(parts: list[Encoded]) -> Encoded:
        return Encoded(torch.cat([p.embeds for p in parts]), torch.cat([p.mask for p in parts]))


class PromptEncoder:
    """Encodes prompts, each once: a text seen before comes from the cache (`hits`, `misses`)."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: Component,
        device: torch.device,
        max_batch: int,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.device, self.max_batch = device, max_batch
        self.hits = self.misses = 0
        self._cache: OrderedDict[str, Encoded] = OrderedDict()

    def __call__(self, prompts: list[str]) -> Encoded:
        """The embeddings of B prompts; warns when one is longer than the model reads."""
        missing = list(dict.fromkeys(text for text in prompts if text not in self._cache))
        self.misses += len(missing)
        self.hits += len(prompts) - len(missing)
        fresh: dict[str, Encoded] = {}
        for start in range(0, len(missing), self.max_batch):
            chunk = missing[start : start + self.max_batch]
            encoded = self._encode(chunk)
            fresh.update((text, encoded[i : i + 1]) for i, text in enumerate(chunk))
        found = [fresh[text] if text in fresh else self._cache[text] for text in prompts]
        for text, encoded in zip(prompts, found, strict=True):
            self._cache[text] = encoded
            self._cache.move_to_end(text)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return Encoded.cat(found)

    def _encode(self, prompts: list[str]) -> Encoded:
        tokens = self.tokenizer(prompts)
        ids, mask = (t.to(self.device) for t in (tokens.input_ids, tokens.attention_mask))
        embeds = self.text_encoder(input_ids=ids, attention_mask=mask).to(self.device)
        return Encoded(embeds, mask.bool())


def unconditional(
    convention: CfgNull,
    prompt: Encoded,
    negative: list[str],
    encoder: PromptEncoder | None,
    y_embedding: Tensor | None,
) -> Encoded:
    """What the unconditional half sees, a row per row of `prompt` (see CfgNull).

    A negative prompt that is not empty replaces the convention for its row.
    """
    if convention is CfgNull.Y_EMBEDDING and all(text == "" for text in negative):
        return _null_rows(prompt, y_embedding)
    if encoder is None:
        raise BundleError(
            "this bundle has no text encoder for the negative prompt; pass "
            "negative_prompt_embeds or build the bundle with --components text_encoder too"
        )
    encoded = encoder(negative)
    if convention is CfgNull.EMPTY_PROMPT:
        return encoded
    null = encoded
    if convention is CfgNull.Y_EMBEDDING:
        null = _null_rows(prompt, y_embedding)
    own = torch.tensor([text != "" for text in negative], device=encoded.mask.device)
    return Encoded(
        torch.where(own[:, None, None], encoded.embeds, null.embeds),
        torch.where(own[:, None], encoded.mask, prompt.mask),
    )


def _null_rows(prompt: Encoded, y_embedding: Tensor | None) -> Encoded:
    if y_embedding is None:
        raise BundleError("the bundle lacks y_embedding.safetensors; build it again")
    return Encoded(y_embedding.expand_as(prompt.embeds), prompt.mask)
