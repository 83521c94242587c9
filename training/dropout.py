"""What classifier-free guidance learns its unconditional half from: dropped captions and labels.

One caption in ten is replaced (arXiv:2207.12598; 0.1 in PixArt-alpha's code). By what is one of
three published conventions, a setting that the checkpoint keeps (CfgNull in config.py): training
and sampling must agree, and pixart_rt/inference/prompts.py is the other side.

B samples, T text tokens, C caption channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_rt.config import CfgNull
from pixart_rt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NullText:
    """What a dropped caption becomes: embeds [T, C] under a mask [T]; None is the caption's own."""

    embeds: Tensor
    mask: Tensor | None


def null_text(
    convention: CfgNull,
    *,
    empty_prompt: tuple[Tensor, Tensor] | None = None,
    y_embedding: Tensor | None = None,
) -> NullText:
    """The null of a convention.

    `empty_prompt` is T5("") and its mask, [T, C] and [T]; y_embedding is [T, C]. Raises ConfigError
    where the one that the convention needs is not given.
    """
    if convention is CfgNull.Y_EMBEDDING:
        if y_embedding is None:
            raise ConfigError(f"cfg_null {convention} needs the checkpoint's y_embedding")
        return NullText(y_embedding, None)
    if empty_prompt is None:
        raise ConfigError(
            f"cfg_null {convention} needs the text encoder's output of an empty prompt"
        )
    embeds, mask = empty_prompt
    return NullText(embeds, mask.bool() if convention is CfgNull.EMPTY_PROMPT else None)


def draw_dropped(
    batch: int,
    share: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which samples are dropped: [B] boolean, each True with probability `share`."""
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of dropped samples must be between 0 and 1, got {share}")
    return torch.rand(batch, generator=generator, device=device) < share


def drop_captions(
    prompt_embeds: Tensor, prompt_mask: Tensor, dropped: Tensor, null: NullText
) -> tuple[Tensor, Tensor]:
    """prompt_embeds [B, T, C] and prompt_mask [B, T], those where `dropped` [B] become `null`.

    T may be shorter than the null, whose first tokens are then taken.
    """
    T = prompt_embeds.shape[1]
    if len(null.embeds) < T:
        raise ConfigError(
            f"captions of {T} tokens cannot be dropped to a null of {len(null.embeds)}; give one "
            "as long as the model's max_text_tokens"
        )
    embeds = torch.where(dropped[:, None, None], null.embeds[:T].to(prompt_embeds), prompt_embeds)
    if null.mask is None:
        return embeds, prompt_mask
    mask = torch.where(dropped[:, None], null.mask[:T].to(prompt_mask), prompt_mask)
    return embeds, mask


def drop_labels(labels: Tensor, dropped: Tensor, null_label: int) -> Tensor:
    """Labels [B] of a DiT, those where `dropped` [B] become the null label."""
    return torch.where(dropped, null_label, labels)
