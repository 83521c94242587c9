"""Prompt text to token ids, as diffusers' PixArt pipelines do it.

Captions are cleaned first (captions.py), then cut into sentencepiece tokens by transformers. Other
than diffusers, a prompt of which cleaning would leave nothing is used as it stands: there it would
silently become the empty prompt, which is the unconditional one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import torch
from torch import Tensor

from pixart_rt.errors import CheckpointError, shorten
from pixart_rt.model.captions import (
    MAX_CHARACTERS,
    clean_caption,
    without_lone_surrogates,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and mask [B, T] int64, and how many tokens of each prompt were cut off."""

    input_ids: Tensor
    attention_mask: Tensor
    num_cut: list[int]


class PromptTokenizer:
    """Cleans, tokenizes and pads prompts to the model's text length, with the end token."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} is missing; a pipeline folder has a tokenizer")
        from transformers import T5Tokenizer  # a second to import, for those who have a tokenizer

        self.max_tokens = max_tokens
        try:
            self.tokenizer = T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
            self._padded(["a"])  # a damaged one may be read and still have no padding or end
        except BaseException as error:  # tokenizers panics, which is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"the tokenizer in {folder} is damaged ({reason[0]}); download it again"
            ) from error

    def __call__(self, prompts: list[str]) -> Tokens:
        cleaned = [self._clean(prompt) for prompt in prompts]
        whole = self.tokenizer(cleaned, add_special_tokens=True)["input_ids"]
        num_cut = [max(0, len(ids) - self.max_tokens) for ids in whole]
        for prompt, cut in zip(prompts, num_cut, strict=True):
            if cut:
                logger.warning(
                    "the prompt %s is too long: its last %d tokens were cut, the model reads %d",
                    shorten(prompt), cut, self.max_tokens,
                )  # fmt: skip
        for prompt, ids in zip(prompts, whole, strict=True):
            if self._knows_nothing(ids):
                logger.warning(
                    "the tokenizer knows no word of the prompt %s: all such prompts give one "
                    "image; write it in English", shorten(prompt),
                )  # fmt: skip
        return Tokens(*self._padded(cleaned), num_cut)

    def _padded(self, cleaned: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of texts, cut and filled to the model's length."""
        batch = self.tokenizer(
            cleaned,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
        )
        return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])

    def _clean(self, prompt: str) -> str:
        """The cleaned prompt; as it stands, in lower case, where cleaning would leave nothing.

        The empty prompt is the unconditional one: nobody who wrote something means it.
        """
        cleaned = clean_caption(prompt)
        if cleaned or not prompt.strip():
            return cleaned
        plain = without_lone_surrogates(unescape(prompt[:MAX_CHARACTERS])).strip().lower()
        logger.warning(
            "nothing is left of the prompt %s after cleaning, which removes Chinese characters, "
            "@names, #numbers, links and file names; %s", shorten(prompt),
            "it is used as it stands" if plain else "the model sees the empty prompt",
        )  # fmt: skip
        return plain

    def _knows_nothing(self, ids: list[int]) -> bool:
        """Whether there are unknown tokens, and no others but spaces and the end."""
        unknown = self.tokenizer.unk_token_id
        if unknown not in ids:
            return False
        words = self.tokenizer.convert_ids_to_tokens([token for token in ids if token != unknown])
        return not any(word.strip("▁") for word in words if word != self.tokenizer.eos_token)
