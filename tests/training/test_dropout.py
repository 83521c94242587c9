"""Dropped captions against what sampling shows the model unconditionally (inference/prompts.py)."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.config import CfgNull
from pixart_rt.errors import ConfigError
from pixart_rt.inference.prompt_embeds import PromptEmbeds
from pixart_rt.inference.prompts import unconditional
from pixart_rt.training.dropout import (
    NullText,
    draw_dropped,
    drop_captions,
    drop_labels,
    null_text,
)

B, T, C = 4, 7, 5


@pytest.fixture
def captions():
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 2])
    embeds = torch.randn(B, T, C, generator=random)
    return embeds, torch.arange(T)[None] < lengths[:, None]


@pytest.fixture
def sources():
    """T5("") with its mask of one token, and a y_embedding."""
    empty, y_embedding = torch.randn(2, T, C, generator=torch.Generator().manual_seed(1))
    return {"empty_prompt": (empty, torch.arange(T) < 1), "y_embedding": y_embedding}


@pytest.mark.parametrize("convention", CfgNull)
def test_a_dropped_caption_is_what_sampling_calls_unconditional(captions, sources, convention):
    embeds, mask = captions
    empty, empty_mask = sources["empty_prompt"]

    def encoder(prompts, whole):
        assert set(prompts) == {""}
        n = len(prompts)
        counts = (int(empty_mask.sum()),) * n
        return PromptEmbeds(empty.expand(n, T, C), empty_mask.expand(n, T), counts)

    given = PromptEmbeds(embeds, mask, tuple(mask.sum(1).tolist()))
    expected = unconditional(convention, given, [""] * B, encoder, sources["y_embedding"])
    dropped = torch.tensor([True, False, True, True])
    found, found_mask = drop_captions(embeds, mask, dropped, null_text(convention, **sources))
    assert torch.equal(found[dropped], expected.embeds[dropped])
    assert torch.equal(found_mask[dropped], expected.mask[dropped])
    assert torch.equal(found[1], embeds[1]) and torch.equal(found_mask[1], mask[1])
    assert found_mask.dtype == torch.bool


def test_the_three_conventions_differ(captions, sources):
    results = [
        drop_captions(*captions, torch.ones(B, dtype=torch.bool), null_text(each, **sources))
        for each in CfgNull
    ]
    assert not torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[1][1], results[2][1])


def test_half_precision_captions_and_a_shorter_batch(captions, sources):
    """Batches are padded to their own longest caption; the null follows, in the captions' dtype."""
    embeds, mask = captions[0][:, :3].bfloat16(), captions[1][:, :3].long()
    null = null_text(CfgNull.EMPTY_PROMPT, **sources)
    found, found_mask = drop_captions(embeds, mask, torch.ones(B, dtype=torch.bool), null)
    assert found.dtype == torch.bfloat16 and found_mask.dtype == torch.int64
    assert torch.equal(found[2], sources["empty_prompt"][0][:3].bfloat16())
    assert found_mask.tolist() == [[1, 0, 0]] * B


def test_the_share_of_dropped_samples():
    """Of 20000 draws, within four standard deviations of 0.1; repeated with the same seed."""
    drawn = [draw_dropped(20_000, 0.1, generator=torch.Generator().manual_seed(5)) for _ in "ab"]
    assert torch.equal(*drawn)
    assert drawn[0].dtype == torch.bool
    assert abs(drawn[0].float().mean().item() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert not draw_dropped(100, 0.0).any() and draw_dropped(100, 1.0).all()


def test_dropped_labels_are_the_null_label():
    dropped = torch.tensor([False, True, False])
    assert drop_labels(torch.tensor([3, 7, 9]), dropped, 10).tolist() == [3, 10, 9]


def test_what_is_lacking_is_said(captions):
    with pytest.raises(ConfigError, match="y_embedding"):
        null_text(CfgNull.Y_EMBEDDING)
    with pytest.raises(ConfigError, match="empty prompt"):
        null_text(CfgNull.EMPTY_PROMPT_CAPTION_MASK, y_embedding=torch.zeros(T, C))
    with pytest.raises(ConfigError, match="a null of 3"):
        drop_captions(*captions, torch.ones(B, dtype=torch.bool), NullText(torch.zeros(3, C), None))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        draw_dropped(3, 1.5)
