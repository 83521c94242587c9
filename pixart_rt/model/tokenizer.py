"""Prompt text to token ids, exactly as diffusers' PixArt pipelines do it.

Captions are cleaned first (captions.py), then cut into sentencepiece tokens by transformers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixart_rt.errors import CheckpointError, shorten
from pixart_rt.model.captions import clean_caption

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

        self.tokenizer = T5Tokenizer.from_pretrained(str(folder))
        self.max_tokens = max_tokens

    def __call__(self, prompts: list[str]) -> Tokens:
        cleaned = [clean_caption(prompt) for prompt in prompts]
        for prompt, left in zip(prompts, cleaned, strict=True):
            if prompt.strip() and not left:
                logger.warning(
                    "nothing is left of the prompt %s after cleaning, which removes Chinese "
                    "characters, @names, #numbers, links and file names; the model sees the empty "
                    "prompt", shorten(prompt),
                )  # fmt: skip
        whole = self.tokenizer(cleaned, add_special_tokens=True)["input_ids"]
        num_cut = [max(0, len(ids) - self.max_tokens) for ids in whole]
        for prompt, cut in zip(prompts, num_cut, strict=True):
            if cut:
                logger.warning(
                    "the prompt %s is too long: its last %d tokens were cut, the model reads %d",
                    shorten(prompt), cut, self.max_tokens,
                )  # fmt: skip
        batch = self.tokenizer(
            cleaned,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
        )
        return Tokens(
            torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"]), num_cut
        )
