"""The ControlNet-Transformer against a plain float64 one, and its form for denoising."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import Kernels, ModelConfig
from pixart_rt.errors import ConfigError
from pixart_rt.inference.step_cache import FirstBlockRun
from pixart_rt.model.controlnet import ControlNetTransformer, text_blocks
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.text_kv import PromptText, TextSide
from pixart_rt.model.transformer import PixArtTransformer
from tests.conftest import randomize
from tests.model.plain_controlnet import plain_controlnet

CONFIG = ModelConfig(num_layers=4, num_heads=2, caption_channels=24, sample_size=32,
                     micro_conditioning=False, interpolation_scale=1.0)  # fmt: skip
B, N, T = 3, 29, CONFIG.max_text_tokens
EXACT = 1e-11  # float64: what remains is the order of sums, over up to 8 blocks
SHAPES = [
    ("parallel", 4), ("parallel", 1), ("parallel", 2), ("chained", 1), ("chained", 2),
    ("chained", 3),
]  # fmt: skip


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    counts = torch.tensor([[1], [17], [T]])
    return {
        "tokens": 2 * randn(0, B, N, 16) + 0.5,
        "pos_embed": randn(1, B, N, 144),
        "modulation": 0.5 * randn(2, B, 7, 144),
        "prompt_embeds": randn(3, B, T, 24),
        "prompt_mask": torch.arange(T) < counts,
        "control": 3 * randn(4, B, N, 16) - 1,
    }


def made(variant: str, copies: int, seed: int = 5) -> ControlNetTransformer:
    """A random one in float64, no parameter zero or small."""
    settings = ControlNetConfig(variant=ControlVariant(variant), num_copies=copies)
    model = ControlNetTransformer(CONFIG, settings).double().eval().requires_grad_(False)
    randomize(model, seed)
    return model


@pytest.fixture(params=SHAPES, ids=[f"{name}-{copies}" for name, copies in SHAPES])
def model(request: Any) -> ControlNetTransformer:
    return made(*request.param)


def test_output_is_that_of_the_formulas(model, inputs) -> None:
    expected = plain_controlnet(model.state_dict(), 2, model.controlnet.variant, **inputs)
    actual = model(**inputs)
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=EXACT)
    other = inputs["control"].roll(1, dims=1)  # the same numbers elsewhere: positions matter
    assert float((model(**{**inputs, "control": other}) - actual).abs().max()) > 1e-2


def test_without_control_it_is_the_model(model, inputs) -> None:
    plain = PixArtTransformer(CONFIG).double()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("copies")}
    )
    given = {name: value for name, value in inputs.items() if name != "control"}
    torch.testing.assert_close(model(**given), plain(**given), atol=0, rtol=0)
    expected = plain_controlnet(model.state_dict(), 2, "parallel", **given, control=None)
    torch.testing.assert_close(model(**given), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize(("variant", "copies"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_untrained_one_changes_no_bit(variant, copies, dtype, inputs) -> None:
    plain = PixArtTransformer(CONFIG).to(dtype).eval()
    randomize(plain, 6)
    settings = ControlNetConfig(variant=ControlVariant(variant), num_copies=copies)
    model = ControlNetTransformer.of(plain, settings)
    given = {name: value for name, value in inputs.items() if name != "control"}
    with torch.no_grad():
        assert torch.equal(model(**inputs), plain(**given))
    for index in range(copies):
        mine = dict(model.copies[index].block.named_parameters())
        for name, parameter in plain.blocks[index].named_parameters():
            assert torch.equal(parameter, mine[name])
            assert parameter.data_ptr() != mine[name].data_ptr(), "a copy shares no memory"
    assert model.x_embedder.weight.data_ptr() == plain.x_embedder.weight.data_ptr()


def twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


@pytest.mark.parametrize("null_tokens", [[1, 1, 1], [1, 9, 1]], ids=["constant", "attended"])
@pytest.mark.parametrize("text_tokens", [[2, 16, 1], [120, 1, 77]])
def test_guided_rows_give_the_whole_output(model, inputs, null_tokens, text_tokens) -> None:
    """The denoising form: control and image once for both halves, text in each of its forms."""
    null_embeds = randn(7, B, T, 24)
    counts = torch.tensor([null_tokens + text_tokens]).T
    expected = model(
        twice(inputs["tokens"]), twice(inputs["pos_embed"]), twice(inputs["modulation"]),
        torch.cat([null_embeds, inputs["prompt_embeds"]]), torch.arange(T) < counts,
        control=twice(inputs["control"]),
    )  # fmt: skip
    side = TextSide.of(model)
    assert len(side.blocks) == len(text_blocks(model)) == 4 + model.controlnet.num_copies
    null = side(null_embeds, torch.arange(T) < counts[:B], max(null_tokens))
    text = side(inputs["prompt_embeds"], torch.arange(T) < counts[B:], max(text_tokens))
    images, nothing = torch.arange(B), text.kv.new_zeros(len(side.blocks), 0, 1, 144)
    shared = {name: inputs[name] for name in ("tokens", "pos_embed", "modulation", "control")}
    if null.constant is not None:
        rows, constant, kept = (images, images), null.constant, text
    else:
        rows, constant, kept = (images[:0], twice(images)), nothing, PromptText.cat([null, text])
    given = {
        **shared, "null_rows": rows[0], "text_rows": rows[1], "constant": constant,
        "prompt_mask": kept.mask, "outputs": torch.tensor([0, 5, 3]),
    }  # fmt: skip
    denoiser = DenoiserModule(copy.deepcopy(model))
    actual = denoiser(**given, text_kv=kept.kv)
    torch.testing.assert_close(actual, expected[..., [0, 5, 3]], atol=EXACT, rtol=EXACT)
    absorbed = side.absorbed(kept)
    if absorbed is not None:
        names = ("absorbed_keys", "absorbed_bias", "absorbed_values")
        actual = denoiser(**given, **dict(zip(names, absorbed, strict=True)))
        torch.testing.assert_close(actual, expected[..., [0, 5, 3]], atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("variant", ["parallel", "chained"])
def test_the_fused_operators_agree(variant, inputs, no_kernels) -> None:
    """Their references, at their call sites; the kernels have tests of their own."""
    model = made(variant, 2).float()
    expected = model(**inputs)
    actual = model.use(Kernels.FUSED)(**inputs)
    # float32 through up to 6 blocks of values up to 60, summed in another order
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["parallel", "chained"])
def test_gradients_reach_every_parameter(variant, inputs) -> None:
    model = made(variant, 2).requires_grad_(True)
    model(**inputs).square().mean().backward()
    lacking = [
        name for name, each in model.named_parameters()
        if not name.startswith("modulator") and (each.grad is None or not each.grad.any())
    ]  # fmt: skip
    assert lacking == []


def test_a_first_block_cache_is_refused(inputs) -> None:
    model = made("chained", 1)
    cache = FirstBlockRun(lambda **_: inputs["tokens"], 1, 0.1)
    with pytest.raises(ConfigError, match="first-block cache is not supported with a ControlNet"):
        model.denoise(
            inputs["tokens"], inputs["pos_embed"], inputs["modulation"], torch.arange(B), [],
            cache=cache, control=inputs["control"],
        )  # fmt: skip


@pytest.mark.parametrize(("variant", "copies"), [("parallel", 5), ("chained", 4)])
def test_more_copies_than_blocks_are_refused(variant, copies) -> None:
    settings = ControlNetConfig(variant=ControlVariant(variant), num_copies=copies)
    with pytest.raises(ConfigError, match=f"with {copies} copies was requested for a model of 4"):
        ControlNetTransformer(CONFIG, settings)


def test_settings_are_checked_and_go_to_json_and_back() -> None:
    with pytest.raises(ConfigError, match="num_copies must be at least 1"):
        ControlNetConfig(num_copies=0)
    for settings in (ControlNetConfig(), ControlNetConfig(variant=ControlVariant.PARALLEL)):
        assert ControlNetConfig.from_dict(settings.to_dict()) == settings
    for values in ({"variant": "sideways", "num_copies": 2}, {"num_copies": 2}, {"depth": 3}):
        with pytest.raises(ConfigError, match="ControlNet settings"):
            ControlNetConfig.from_dict(values)
