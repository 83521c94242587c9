"""Our T5 encoder against transformers' T5EncoderModel."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config as TransformersConfig
from transformers import T5EncoderModel

from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.config import ModelConfig
from pixart_rt.errors import CheckpointError
from pixart_rt.model.text_encoder import T5Config, relative_bucket
from pixart_rt.model.tokenizer import PromptTokenizer

LENGTHS = (1, 2, 37, 119, 120)
ONE = T5Config(vocab_size=1, d_model=1, d_kv=1, d_ff=1, num_heads=1, num_layers=1)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    model = T5EncoderModel(
        TransformersConfig(
            vocab_size=97,
            d_model=48,
            d_kv=16,
            d_ff=80,
            num_heads=3,
            num_layers=4,
            feed_forward_proj="gated-gelu",
        )
    )
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (len(LENGTHS), 120), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(120)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def test_matches_transformers_in_float32(t5_folder: Path) -> None:
    ids, mask = prompts()
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5_folder)(ids, attention_mask=mask)[0]
        actual = read_text_encoder(t5_folder, torch.float32)(ids, mask)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)  # float32, 4 layers


@pytest.mark.parametrize("bounds", [[0, 1, 4], [0, 2, 3, 4]])
def test_parts_run_in_turn_equal_the_whole(t5_folder: Path, bounds: list[int]) -> None:
    ids, mask = prompts()
    hidden = ids
    for start, stop in pairwise(bounds):
        hidden = read_text_encoder(t5_folder, torch.float32, start, stop)(hidden, mask)
    whole = read_text_encoder(t5_folder, torch.float32)(ids, mask)
    assert torch.equal(hidden, whole)


def test_folding_the_position_bias_changes_nothing(t5_folder: Path) -> None:
    ids, mask = prompts()
    encoder = read_text_encoder(t5_folder, torch.float32)
    expected = encoder(ids, mask)
    encoder.fold_position_bias(120)
    assert torch.equal(encoder(ids, mask), expected)


def test_float16_survives_a_residual_stream_beyond_its_range(t5_folder: Path) -> None:
    """T5-XXL's `wo` output passes 65504; the oracle is the same weights in float64."""
    ids, mask = prompts()
    encoders = {dtype: read_text_encoder(t5_folder, dtype) for dtype in (torch.float16,)}
    oracle = read_text_encoder(t5_folder, torch.float32).double()
    for encoder in (*encoders.values(), oracle):
        encoder.layers[1].wo.weight.data.mul_(1e5)
    hidden: list[torch.Tensor] = []
    oracle.layers[1].register_forward_hook(lambda _m, _i, out: hidden.append(out))
    expected = oracle(ids, mask)
    assert hidden[0].abs().max() > 65504, "the test must leave float16's range"
    actual = encoders[torch.float16](ids, mask)
    assert actual.isfinite().all()
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 5e-3  # float16 products over 4 layers


def test_relative_buckets_match_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(300)[None] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, 32, 128)
    assert torch.equal(relative_bucket(300, ONE), expected)


@pytest.mark.parametrize(("buckets", "furthest"), [(8, 20), (16, 64), (32, 200), (12, 40)])
def test_relative_buckets_of_other_sizes(buckets: int, furthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    config = replace(ONE, relative_attention_num_buckets=buckets,
                     relative_attention_max_distance=furthest)  # fmt: skip
    offset = torch.arange(300)[None] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, furthest)
    assert torch.equal(relative_bucket(300, config), expected)


def test_nothing_is_copied_from_the_host(t5_folder: Path) -> None:
    """A CUDA graph cannot hold such a copy. The device without memory shows it as well as a GPU."""

    class NoHost(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            for each in tree_leaves((args, result)):
                assert not isinstance(each, torch.Tensor) or each.is_meta, func
            return result

    encoder = read_text_encoder(t5_folder, torch.float32).to("meta")
    ids, mask = (each.to("meta") for each in prompts())
    with torch.no_grad(), NoHost():
        assert encoder(ids, mask).shape == (len(LENGTHS), 120, 48)


def test_missing_and_truncated_weights_are_named(t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_text_encoder(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text((t5_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_text_encoder(tmp_path, torch.float32)
    whole = (t5_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_text_encoder(tmp_path, torch.float32)


def test_tokens_are_sentencepiece_ids_padded_and_ended(pipeline_folder) -> None:
    import sentencepiece

    folder = pipeline_folder(32) / "tokenizer"
    tokens = PromptTokenizer(folder, ModelConfig().max_text_tokens)(["a red circle", ""])
    spiece = next(folder.parent.parent.rglob("spiece.model"), None)
    assert spiece is not None
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode("a red circle")
    assert tokens.input_ids.shape == (2, 120)
    assert tokens.input_ids[0, : len(pieces) + 1].tolist() == [*pieces, 1]
    assert tokens.attention_mask.sum(1).tolist() == [len(pieces) + 1, 1]


def test_a_long_prompt_is_cut_and_says_so(pipeline_folder, caplog) -> None:
    tokenizer = PromptTokenizer(pipeline_folder(32) / "tokenizer", 120)
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer(["a red circle above " * 60])
    assert tokens.num_cut[0] > 0
    assert f"last {tokens.num_cut[0]} tokens were cut" in caplog.text


@pytest.mark.parametrize("prompt", ["一只红色的猫", "@redcircle", "#12345", "circle.jpg", "*"])
def test_a_prompt_that_is_cleaned_to_nothing_is_used_as_it_stands(
    prompt: str, pipeline_folder, caplog
) -> None:
    tokenizer = PromptTokenizer(pipeline_folder(32) / "tokenizer", 120)
    with caplog.at_level(logging.WARNING):
        tokenizer(["", "  ", "a red circle"])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer([prompt])
    expected = tokenizer.tokenizer(prompt.lower())["input_ids"]
    assert tokens.input_ids[0, : len(expected)].tolist() == expected != [1], "not the empty prompt"
    assert f"nothing is left of the prompt {prompt!r}" in caplog.text
    assert "used as it stands" in caplog.text


def test_a_prompt_of_spaces_in_html_is_the_empty_one_and_says_so(pipeline_folder, caplog) -> None:
    tokenizer = PromptTokenizer(pipeline_folder(32) / "tokenizer", 120)
    with caplog.at_level(logging.WARNING):
        assert tokenizer(["&nbsp;"]).attention_mask.sum() == 1
    assert "the model sees the empty prompt" in caplog.text


def test_a_prompt_without_a_known_word_says_so(pipeline_folder, caplog) -> None:
    tokenizer = PromptTokenizer(pipeline_folder(32) / "tokenizer", 120)
    with caplog.at_level(logging.WARNING):
        tokenizer(["красный круг"])
    assert "knows no word of the prompt 'красный круг'" in caplog.text


def test_half_an_emoji_of_a_prompt_that_stands_as_it_is(pipeline_folder) -> None:
    """Cleaning takes the whole as a file name; half a UTF-16 pair is no UTF-8."""
    tokenizer = PromptTokenizer(pipeline_folder(32) / "tokenizer", 120)
    assert tokenizer(["\ud83d.jpg"]).attention_mask.sum() > 1
