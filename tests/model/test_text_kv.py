"""The text side apart from the blocks, in each of its forms, against the whole forward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import ModelConfig
from pixart_rt.model.text_kv import PromptText, TextSide
from pixart_rt.model.transformer import PixArtTransformer
from tests.conftest import randomize

CONFIG = ModelConfig(num_layers=3, num_heads=2, caption_channels=24, sample_size=32,
                     micro_conditioning=False, interpolation_scale=1.0)  # fmt: skip
B, N, T = 3, 37, CONFIG.max_text_tokens
EXACT = 1e-12  # float64: what remains is the order of sums


@pytest.fixture(scope="module")
def model() -> PixArtTransformer:
    model = PixArtTransformer(CONFIG).double().eval().requires_grad_(False)
    randomize(model, 3)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "tokens": randn(B, N, 16), "pos_embed": randn(B, N, 144), "modulation": randn(B, 7, 144),
        "null": randn(B, T, 24), "text": randn(B, T, 24),
    }  # fmt: skip


def mask(counts: list[int]) -> torch.Tensor:
    return torch.arange(T) < torch.tensor(counts)[:, None]


def twice(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


@pytest.mark.parametrize("null_tokens", [[1, 1, 1], [1, 9, 1]], ids=["constant", "attended"])
@pytest.mark.parametrize("text_tokens", [[2, 16, 1], [31, 7, 32], [64, 33, 5], [120, 1, 77]])
def test_every_form_gives_the_whole_model_s_output(model, inputs, null_tokens, text_tokens) -> None:
    expected = model(
        twice(inputs["tokens"]), twice(inputs["pos_embed"]), twice(inputs["modulation"]),
        torch.cat([inputs["null"], inputs["text"]]), mask(null_tokens + text_tokens),
    )  # fmt: skip
    side, denoiser = TextSide.of(model), DenoiserModule(copy.deepcopy(model))
    null = side(inputs["null"], mask(null_tokens), max(null_tokens))
    text = side(inputs["text"], mask(text_tokens), max(text_tokens))
    images = torch.arange(B)
    constant = null.constant
    assert (constant is None) is (max(null_tokens) > 1)
    if constant is None:
        constant = torch.zeros(3, 0, 1, 144, dtype=torch.float64)
        rows, text = (images[:0], twice(images)), PromptText.cat([null, text])
    else:
        rows = (images, images)
    every = [inputs["tokens"], inputs["pos_embed"], inputs["modulation"], *rows, constant,
             text.mask, torch.arange(32)]  # fmt: skip
    actual = denoiser(*every, text_kv=text.kv)
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=EXACT)
    absorbed = side.absorbed(text)
    assert (absorbed is None) is (text.num_tokens > 64)
    if absorbed is not None:
        actual = denoiser(
            *every, absorbed_keys=absorbed.keys, absorbed_bias=absorbed.bias,
            absorbed_values=absorbed.values,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, atol=EXACT, rtol=EXACT)


def test_rows_may_be_any_images_and_outputs_any_channels(model, inputs) -> None:
    rows, channels = torch.tensor([2, 0, 0, 1]), torch.tensor([5, 0, 31])
    embeds = torch.cat([inputs["text"], inputs["null"][:1]])
    seen = mask([4, 120, 1, 50])
    expected = model(
        inputs["tokens"][rows], inputs["pos_embed"][rows], inputs["modulation"][rows], embeds, seen
    )[..., channels]
    text = TextSide.of(model)(embeds, seen, 120)
    nothing = torch.zeros(3, 0, 1, 144, dtype=torch.float64)
    actual = DenoiserModule(copy.deepcopy(model))(
        inputs["tokens"], inputs["pos_embed"], inputs["modulation"], rows[:0], rows, nothing,
        text.mask, channels, text_kv=text.kv,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=EXACT)


def test_prompts_join_and_divide(model, inputs) -> None:
    side = TextSide.of(model)
    one = side(inputs["null"][:1], mask([1]), 1)
    long = side(inputs["text"][:2], mask([3, 9]), 9)
    both = PromptText.cat([one, long])
    assert both.num_tokens == 9 and both.constant is None and one.constant is not None
    assert torch.equal(both[1:3].kv, long.kv) and torch.equal(both.mask[0], one.mask[0])
    assert PromptText.cat([one, one]).constant.shape == (3, 2, 1, 144)
    assert one.num_bytes == 8 * one.kv.numel() + T + 8 * one.constant.numel()
