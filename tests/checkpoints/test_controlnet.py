"""ControlNet checkpoints: both layouts there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pixart_rt.checkpoints.controlnet import (
    ControlNetCheckpoint,
    controlnet_of,
    load_controlnet,
    read_controlnet,
    write_controlnet,
    write_controlnet_pth,
)
from pixart_rt.checkpoints.transformer import TransformerCheckpoint
from pixart_rt.config import ModelConfig
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.transformer import PixArtTransformer
from tests.conftest import randomize

CONFIG = ModelConfig(num_layers=3, num_heads=2, caption_channels=24, sample_size=32,
                     micro_conditioning=True, interpolation_scale=1.0)  # fmt: skip
PARALLEL = ControlNetConfig(variant=ControlVariant.PARALLEL, num_copies=3)
CHAINED = ControlNetConfig(num_copies=2)
BLOCK = (  # of the original code's PixArtMSBlock: every tensor that a copy of it has
    "scale_shift_table", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
    "cross_attn.q_linear.weight", "cross_attn.q_linear.bias", "cross_attn.kv_linear.weight",
    "cross_attn.kv_linear.bias", "cross_attn.proj.weight", "cross_attn.proj.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> TransformerCheckpoint:
    module = PixArtTransformer(CONFIG)
    randomize(module, 0)
    null = torch.randn(CONFIG.max_text_tokens, 24)
    return TransformerCheckpoint(CONFIG, module.state_dict(), null, "the model")


@pytest.fixture(params=[PARALLEL, CHAINED], ids=["parallel", "chained"])
def controlnet(request: pytest.FixtureRequest, model) -> ControlNetCheckpoint:
    module = ControlNetTransformer(CONFIG, request.param)
    randomize(module, 1)
    return controlnet_of(module, "a module")


def assert_same(actual: ControlNetCheckpoint, expected: ControlNetCheckpoint) -> None:
    assert actual.config == expected.config
    assert actual.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(actual.state[name], tensor), name


def test_a_folder_gives_back_what_was_written(controlnet, model, tmp_path: Path) -> None:
    write_controlnet(controlnet, tmp_path / "out")
    found = read_controlnet(tmp_path / "out", CONFIG)
    assert_same(found, controlnet)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json", "model.safetensors", "pixart_rt.json",
    ]  # fmt: skip
    write_controlnet(found, tmp_path / "out")  # over another ControlNet's
    loaded = load_controlnet(found, model, torch.bfloat16)
    assert loaded.x_embedder.weight.dtype is torch.bfloat16
    expected = controlnet.state["copies.1.after_proj.weight"].bfloat16()
    assert torch.equal(loaded.copies[1].after_proj.weight, expected)


def test_a_pth_gives_back_what_was_written(controlnet, model, tmp_path: Path) -> None:
    write_controlnet_pth(controlnet, model, tmp_path / "c.pth")
    found = read_controlnet(tmp_path / "c.pth", CONFIG)
    assert_same(found, controlnet)
    assert found.base is not None
    for name, tensor in model.state.items():
        assert torch.equal(found.base[name], tensor), name
    load_controlnet(found, model)


@pytest.mark.parametrize("with_base", [True, False])
def test_the_released_layout_is_read(with_base, model, tmp_path: Path) -> None:
    """Written by hand, name by name, as ControlPixArtHalf's state dict has them."""
    module = ControlNetTransformer(CONFIG, CHAINED)
    randomize(module, 2)
    state = {}
    for index, copied in enumerate(module.copies):
        for name in BLOCK:
            theirs = f"controlnet.{index}.copied_block.{name}"
            state[theirs] = dict(copied.block.named_parameters())[name].detach()
        for kind in ("weight", "bias"):
            after = getattr(copied.after_proj, kind)
            state[f"controlnet.{index}.after_proj.{kind}"] = after.detach()
    state["controlnet.0.before_proj.weight"] = module.copies[0].before_proj.weight.detach()
    state["controlnet.0.before_proj.bias"] = module.copies[0].before_proj.bias.detach()
    if with_base:
        p = CONFIG.patch_size
        for name, tensor in model.state.items():
            theirs = name.removeprefix("modulator.").replace("y_proj.", "y_embedder.y_proj.")
            if name == "x_embedder.weight":
                tensor = tensor.reshape(-1, 4, p, p)
            theirs = theirs.replace("x_embedder.", "x_embedder.proj.")
            state[f"base_model.{theirs}"] = tensor
        state["base_model.pos_embed"] = torch.zeros(1, 256, 144)
        state["base_model.y_embedder.y_embedding"] = model.y_embedding
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "released.pth")
    found = read_controlnet(tmp_path / "released.pth", CONFIG)
    assert_same(found, controlnet_of(module, "module"))
    assert (found.base is not None) is with_base
    loaded = load_controlnet(found, model)
    assert torch.equal(loaded.blocks[2].mlp.fc1.weight, model.state["blocks.2.mlp.fc1.weight"])


def test_another_model_than_the_one_in_the_file_is_refused(controlnet, model, tmp_path) -> None:
    write_controlnet_pth(controlnet, model, tmp_path / "c.pth")
    found = read_controlnet(tmp_path / "c.pth", CONFIG)
    halved = {name: tensor.bfloat16() for name, tensor in model.state.items()}
    load_controlnet(found, TransformerCheckpoint(CONFIG, halved, None, "rounded"))
    other = {name: tensor * 1.02 for name, tensor in model.state.items()}
    with pytest.raises(
        CheckpointError, match=r"trained on other weights than tuned \(they .* 0.02"
    ):
        load_controlnet(found, TransformerCheckpoint(CONFIG, other, None, "tuned"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("controlnet.1.copied_block.mlp.fc1.bias"),
         "lacks controlnet.1.copied_block.mlp.fc1.bias"),
        (lambda s: s.update({"controlnet.0.extra": torch.zeros(1)}),
         "has the unknown controlnet.0.extra"),
        (lambda s: s.update({"controlnet.1.after_proj.bias": torch.zeros(7)}),
         r"wrong shape: controlnet.1.after_proj.bias \[7\]"),
        (lambda s: s["controlnet.1.after_proj.bias"].fill_(float("nan")), "NaN"),
        (lambda s: s.pop("base_model.final_layer.linear.bias"), "base_model lacks final_layer"),
        (lambda s: s.update({"lr": 3.0}), "it holds lr"),
    ],
)  # fmt: skip
def test_a_damaged_pth_is_refused_in_one_line(change, message, model, tmp_path: Path) -> None:
    module = ControlNetTransformer(CONFIG, CHAINED)
    randomize(module, 3)
    write_controlnet_pth(controlnet_of(module, "a module"), model, tmp_path / "c.pth")
    loaded = torch.load(tmp_path / "c.pth", weights_only=True)
    change(loaded["state_dict"])
    torch.save({"state_dict": loaded["state_dict"]}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_controlnet(tmp_path / "c.pth", CONFIG)
    assert "\n" not in str(raised.value)


def test_files_of_another_kind_are_refused(model, tmp_path: Path) -> None:
    torch.save({"state_dict": dict(model.state)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="holds no ControlNet"):
        read_controlnet(tmp_path / "model.pth", CONFIG)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_controlnet(tmp_path / "nothing", CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        read_controlnet(tmp_path / "empty", CONFIG)
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="of another kind"):
        read_controlnet(tmp_path / "empty", CONFIG)
    with pytest.raises(ConfigError, match=r"chooses inside a .pth"):
        read_controlnet(tmp_path / "empty", CONFIG, which="state_dict_ema")
    torch.save({"state_dict": {"controlnet.0.x": torch.zeros(1)}}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match=r"state_dict_ema was requested, but .* has state_dict"):
        read_controlnet(tmp_path / "c.pth", CONFIG, which="state_dict_ema")


def test_a_folder_for_another_model_is_refused(controlnet, tmp_path: Path) -> None:
    write_controlnet(controlnet, tmp_path / "out")
    deeper = ModelConfig(**{**CONFIG.to_dict(), "num_layers": 5})
    with pytest.raises(CheckpointError, match=r"trained for a model with .*'num_layers': 3"):
        read_controlnet(tmp_path / "out", deeper)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "variant": "sideways"}))
    with pytest.raises(CheckpointError, match="damaged settings"):
        read_controlnet(tmp_path / "out", CONFIG)


def test_no_other_folder_is_written_over(controlnet, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a ControlNet folder that pixart-rt wrote"):
        write_controlnet(controlnet, tmp_path / "photos")
    assert (tmp_path / "photos" / "a.txt").read_text() == "mine"
