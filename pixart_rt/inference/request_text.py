"""From the texts of requests to the embeddings of both halves of guidance.

Equal texts are encoded once, all that are new in one go; embeddings that a caller brought are
checked and taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.config import CfgNull, ModelConfig
from pixart_rt.errors import BundleError
from pixart_rt.inference.prompt_embeds import PromptEmbeds, given_embeds
from pixart_rt.inference.prompts import PromptEncoder, unconditional
from pixart_rt.inference.request import Request

Y_EMBEDDING = "y_embedding.safetensors"  # in a bundle whose convention needs it
Text = tuple[PromptEmbeds, PromptEmbeds | None]  # of one image; the second with guidance only


class RequestText:
    """The embeddings of requests. `encoder` may be None where requests bring their own."""

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        encoder: PromptEncoder | None,
        device: torch.device,
    ) -> None:
        """folder: the bundle's."""
        self.config, self.encoder = config, encoder
        self._folder, self._device = folder, device
        self._y_embedding: Tensor | None = None
        path = folder / Y_EMBEDDING
        if config.cfg_null is CfgNull.Y_EMBEDDING and path.is_file():
            self._y_embedding = load_file(path)["y_embedding"].float().to(device)

    def begin(self) -> None:
        """The texts of one call are one request: prompt and negative prompt may be of one shape."""
        if self.encoder is not None:
            self.encoder.graphs.begin()

    def __call__(self, requests: Sequence[Request], *, guided: bool, whole: bool) -> list[Text]:
        """The embeddings for each request. whole: also those of padding (prompts.py)."""
        keys = [_key(request, index) for index, request in enumerate(requests)]
        distinct = dict(zip(keys, requests, strict=True))
        texts = dict(
            zip(distinct, self._distinct(list(distinct.values()), guided, whole), strict=True)
        )
        return [texts[key] for key in keys]

    def _distinct(self, requests: list[Request], guided: bool, whole: bool) -> list[Text]:
        prompts = self._prompts(requests, whole)
        if not guided:
            return [(prompt, None) for prompt in prompts]
        return list(zip(prompts, self._negatives(requests, prompts, whole), strict=True))

    def _prompts(self, requests: list[Request], whole: bool) -> list[PromptEmbeds]:
        texts = [request.prompt for request in requests if request.prompt is not None]
        encoded = iter(self._required().rows(texts, whole=whole) if texts else [])
        return [
            next(encoded)
            if request.prompt_embeds is None
            else self._given("prompt_embeds", request.prompt_embeds, request.prompt_attention_mask)
            for request in requests
        ]

    def _negatives(
        self, requests: list[Request], prompts: list[PromptEmbeds], whole: bool
    ) -> list[PromptEmbeds]:
        pairs = zip(requests, prompts, strict=True)
        asked = [pair for pair in pairs if pair[0].negative_prompt_embeds is None]
        encoded = iter(
            unconditional(
                self.config.cfg_null,
                PromptEmbeds.cat([prompt for _, prompt in asked]),
                [request.negative_prompt or "" for request, _ in asked],
                self.encoder,
                self._y_embedding,
                whole=whole,
            ).rows()
            if asked
            else []
        )
        return [
            next(encoded)
            if request.negative_prompt_embeds is None
            else self._given(
                "negative_prompt_embeds",
                request.negative_prompt_embeds,
                request.negative_prompt_attention_mask,
            )
            for request in requests
        ]

    def _given(self, name: str, embeds: Tensor, mask: Tensor | None) -> PromptEmbeds:
        return given_embeds(name, embeds, mask, self.config, self._device)

    def _required(self) -> PromptEncoder:
        if self.encoder is None:
            raise BundleError(
                f"{self._folder} was built without text_encoder; pass prompt_embeds, or build "
                "again without --components"
            )
        return self.encoder


def _key(request: Request, index: int) -> object:
    """What tells the texts of requests apart; embeddings of a caller are never compared."""
    if request.prompt_embeds is not None or request.negative_prompt_embeds is not None:
        return index
    return request.prompt, request.negative_prompt
