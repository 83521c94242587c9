"""Prompt text to token ids, exactly as diffusers' PixArt pipelines do it.

Captions are cleaned by DeepFloyd-IF's rules, twice, then lower-cased: the published checkpoints
were trained on captions treated so. The rules are diffusers' own code; bs4 and ftfy, without which
diffusers silently skips them, are hard dependencies.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from torch import Tensor
from transformers import T5Tokenizer

from pixart_rt.errors import CheckpointError

logger = logging.getLogger(__name__)


class _Rules:
    """Just the cleaning rules of diffusers' pipeline, without a pipeline."""

    bad_punct_regex = PixArtAlphaPipeline.bad_punct_regex
    _clean_caption = PixArtAlphaPipeline._clean_caption


def clean_caption(text: str) -> str:
    """A caption as the training data had it: cleaned twice, lower case, stripped."""
    rules: Any = _Rules()
    return rules._clean_caption(rules._clean_caption(text)).strip()


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
        self.tokenizer = T5Tokenizer.from_pretrained(str(folder))
        self.max_tokens = max_tokens

    def __call__(self, prompts: list[str]) -> Tokens:
        cleaned = [clean_caption(prompt) for prompt in prompts]
        whole = self.tokenizer(cleaned, add_special_tokens=True)["input_ids"]
        num_cut = [max(0, len(ids) - self.max_tokens) for ids in whole]
        for prompt, cut in zip(prompts, num_cut, strict=True):
            if cut:
                logger.warning(
                    "the prompt %r is too long: its last %d tokens were cut, the model reads %d",
                    prompt if len(prompt) < 60 else prompt[:57] + "...", cut, self.max_tokens,
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
