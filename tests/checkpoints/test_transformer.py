"""Checkpoints there and back, bit for bit; diffusers as the oracle of its own layout."""

import json
import logging
import zipfile
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel, Transformer2DModel
from safetensors.torch import load_file, save_file

from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.tensors import longest_name
from pixart_rt.checkpoints.transformer import (
    WEIGHTS,
    TransformerCheckpoint,
    convert,
    load_transformer,
    read_transformer,
    write_diffusers,
    write_pth,
)
from pixart_rt.config import CfgNull
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.model.embeddings import position_table


@pytest.fixture(scope="module")
def checkpoint(small_config, reference):
    """A small 256 px checkpoint with micro-conditioning and a y_embedding."""
    config = small_config(num_heads=2, sample_size=32, interpolation_scale=1.0)
    state = tensor_names.to_ours(
        reference(config).state_dict(),
        config,
        tensor_names.diffusers_names,
        known=[],
        source="reference",
    )
    null = torch.randn(120, config.caption_channels)
    return TransformerCheckpoint(config, state, null, "memory")


@pytest.fixture
def original(checkpoint):
    """The state dict that the original code would save for `checkpoint`."""
    config = checkpoint.config
    tensors = tensor_names.from_ours(checkpoint.state, config, tensor_names.original_names)
    tensors["pos_embed"] = position_table(config, (16, 16))
    tensors["y_embedder.y_embedding"] = checkpoint.y_embedding
    return tensors


def assert_equal(actual: TransformerCheckpoint, expected: TransformerCheckpoint) -> None:
    assert actual.config == expected.config
    assert actual.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert actual.state[name].dtype == tensor.dtype
        assert torch.equal(actual.state[name], tensor), name
    if expected.y_embedding is None:
        assert actual.y_embedding is None
    else:
        assert torch.equal(actual.y_embedding, expected.y_embedding)


def save(path, tensors):
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_diffusers_folder_there_and_back(tmp_path, checkpoint, dtype):
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.state.items()}
    config = replace(checkpoint.config, cfg_null=CfgNull.Y_EMBEDDING)
    expected = replace(checkpoint, state=state, config=config)
    write_diffusers(expected, tmp_path / "transformer")
    assert_equal(read_transformer(tmp_path / "transformer"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize("null", [CfgNull.EMPTY_PROMPT, CfgNull.Y_EMBEDDING])
def test_pth_there_and_back(tmp_path, checkpoint, null):
    expected = replace(checkpoint, config=replace(checkpoint.config, cfg_null=null))
    summary = write_pth(expected, tmp_path / "model.pth")
    assert_equal(read_transformer(tmp_path / "model.pth"), expected)
    assert summary["num_tensors"] == len(expected.state) + 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_convert_goes_round_bit_by_bit(tmp_path, original, checkpoint):
    """.pth -> diffusers -> .pth has the tensors of the original code, every one unchanged."""
    source = save(tmp_path / "a.pth", {"state_dict": original, "epoch": 3})
    to_folder = convert(source, tmp_path / "folder", heads=2)
    convert(tmp_path / "folder", tmp_path / "b.pth")
    back = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name
    convert(tmp_path / "b.pth", tmp_path / "again")
    for name in (WEIGHTS, "config.json", "y_embedding.safetensors"):
        again, first = tmp_path / "again" / name, tmp_path / "folder" / name
        assert again.read_bytes() == first.read_bytes()
    assert to_folder["config"]["num_heads"] == 2
    assert "y_embedding" in to_folder["kept"][0]
    assert "pos_embed" in to_folder["dropped"][0]
    json.dumps(to_folder)


def test_diffusers_loads_what_we_write(tmp_path, checkpoint, caplog):
    write_diffusers(checkpoint, tmp_path / "transformer")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        try:
            model, report = PixArtTransformer2DModel.from_pretrained(
                tmp_path / "transformer", output_loading_info=True
            )
        finally:
            logging.getLogger("diffusers").propagate = False
    assert not caplog.records  # it ignores our underscored settings without a warning
    assert not any(report.values())
    expected = tensor_names.from_ours(
        checkpoint.state, checkpoint.config, tensor_names.diffusers_names
    )
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.use_additional_conditions
    assert torch.equal(model.pos_embed.pos_embed, position_table(checkpoint.config, (16, 16)))


@pytest.mark.parametrize(
    ("safe", "shard"), [(True, "10GB"), (True, "200KB"), (False, "10GB")],
    ids=["safetensors", "shards", "bin"],
)  # fmt: skip
def test_what_diffusers_writes_is_read(tmp_path, small_config, reference, safe, shard):
    config = small_config()
    model = reference(config)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "200KB")
    found = read_transformer(tmp_path)
    assert found.config == config
    tensors = tensor_names.from_ours(found.state, config, tensor_names.diffusers_names)
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], it) for name, it in model.state_dict().items())


@pytest.mark.parametrize(
    ("sample_size", "scale", "micro"), [(128, 2.0, True), (64, 1.0, False), (32, 1.0, False)]
)
def test_the_legacy_class_and_its_null_settings(tmp_path, sample_size, scale, micro):
    """The published α folders name Transformer2DModel and leave three settings to its defaults."""
    model = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=1, cross_attention_dim=144, attention_bias=True, sample_size=sample_size,
        patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=40,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["_class_name"] == "Transformer2DModel"
    config = read_transformer(tmp_path).config
    assert (config.sample_size, config.interpolation_scale) == (sample_size, scale)
    assert config.micro_conditioning is micro
    assert config.micro_conditioning == model.use_additional_conditions


def test_the_null_embedding_of_the_first_converters(tmp_path, checkpoint):
    """They left it among the weights as caption_projection.y_embedding."""
    write_diffusers(replace(checkpoint, y_embedding=None), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["caption_projection.y_embedding"] = checkpoint.y_embedding
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_equal(read_transformer(tmp_path), checkpoint)


@pytest.mark.parametrize(
    ("family", "tokens"), [("PixArtSigmaPipeline", 300), ("PixArtAlphaPipeline", 120)]
)
def test_a_pipeline_folder_tells_the_text_length(tmp_path, small_config, reference, family, tokens):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family}))
    config = small_config(micro_conditioning=False)
    reference(config).save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, tmp_path / "transformer"):
        assert read_transformer(path).config.max_text_tokens == tokens


def test_configuration_is_inferred_from_the_tensors(tmp_path, original, checkpoint):
    found = read_transformer(save(tmp_path / "plain.pth", original), heads=2)
    assert_equal(found, checkpoint)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_position_table_tells_its_scale(tmp_path, original, checkpoint, scale):
    """Sigma's 256 px model has 0.5, which no rule on the size gives."""
    config = replace(checkpoint.config, interpolation_scale=scale)
    original["pos_embed"] = position_table(config, (16, 16)).half()
    path = save(tmp_path / "model.pth", original)
    found = read_transformer(path, heads=2).config
    assert (found.sample_size, found.interpolation_scale) == (32, scale)
    changed = read_transformer(path, heads=2, interpolation_scale=3.0).config
    assert changed.interpolation_scale == 3.0


@pytest.mark.parametrize(("tokens", "scale"), [(120, 1.0), (300, 0.5)])
def test_without_a_table_the_size_is_a_flag(tmp_path, original, tokens, scale):
    del original["pos_embed"]
    original["y_embedder.y_embedding"] = torch.randn(tokens, 40)
    path = save(tmp_path / "model.pth", {"state_dict": original})
    with pytest.raises(ConfigError, match=r"no pos_embed.*--sample-size"):
        read_transformer(path, heads=2)
    config = read_transformer(path, heads=2, sample_size=32).config
    assert (config.sample_size, config.max_text_tokens) == (32, tokens)
    assert config.interpolation_scale == scale


def test_which_state_dict(tmp_path, original):
    ema = {name: tensor + 1 for name, tensor in original.items()}
    ema["pos_embed"] = original["pos_embed"]
    path = save(tmp_path / "model.pth", {"state_dict": original, "state_dict_ema": ema})
    plain = read_transformer(path, heads=2)
    averaged = read_transformer(path, heads=2, which="state_dict_ema")
    assert torch.equal(plain.state["x_embedder.bias"], original["x_embedder.proj.bias"])
    assert torch.equal(averaged.state["x_embedder.bias"], ema["x_embedder.proj.bias"])
    with pytest.raises(ConfigError, match="--which ema is not supported; choose from state_dict"):
        read_transformer(path, which="ema")
    only = save(tmp_path / "only.pth", {"state_dict": original})
    with pytest.raises(ConfigError, match=r"state_dict_ema was requested, but .* has state_dict"):
        read_transformer(only, heads=2, which="state_dict_ema")


def test_sixteen_heads_are_assumed_aloud(tmp_path, original, caplog):
    with caplog.at_level(logging.WARNING):
        config = read_transformer(save(tmp_path / "model.pth", original)).config
    assert (config.num_heads, config.head_dim) == (16, 9)
    assert "16 heads were assumed, 9 channels each" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"heads": 7}, "7 heads do not divide the width 144"),
        ({"heads": 0}, "0 heads do not divide"),
        ({"heads": 2, "sample_size": 64}, "--sample-size 64 was requested, but .* says 32"),
        (
            {"heads": 2, "max_text_tokens": 300},
            "--max-text-tokens 300 was requested, but .* says 120",
        ),
    ],
)
def test_impossible_flags_for_a_pth(tmp_path, original, flags, message):
    with pytest.raises(ConfigError, match=message):
        read_transformer(save(tmp_path / "model.pth", original), **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"heads": 16}, "--heads 16 was requested, but .* says 2"),
        ({"sample_size": 64}, "--sample-size 64 was requested, but .* says 32"),
        ({"which": "state_dict"}, "is a folder"),
    ],
)
def test_impossible_flags_for_a_folder(tmp_path, checkpoint, flags, message):
    write_diffusers(checkpoint, tmp_path / "transformer")
    with pytest.raises(ConfigError, match=message):
        read_transformer(tmp_path / "transformer", **flags)


def _drop(tensors):
    del tensors["blocks.0.attn.qkv.bias"], tensors["blocks.1.mlp.fc1.bias"]


def _add(tensors):
    tensors["lora.weight"] = torch.zeros(1)


def _reshape(tensors):
    tensors["t_block.1.bias"] = torch.zeros(3)


def _nan(tensors):
    tensors["final_layer.linear.bias"][3] = float("nan")


def _compress(tensors):
    tensors["blocks.1.attn.sr.weight"] = torch.zeros(144, 1, 2, 2)


def _normalize(tensors):
    tensors["blocks.0.attn.q_norm.weight"] = torch.zeros(144)


def _table(tensors):
    tensors["pos_embed"] = torch.zeros(1, 255, 144)


def _learned_table(tensors):
    tensors["pos_embed"] = torch.rand(1, 256, 144)


def _null(tensors):
    tensors["y_embedder.y_embedding"] = torch.zeros(120, 39)


def _not_pixart(tensors):
    del tensors["x_embedder.proj.weight"]


def _not_a_tensor(tensors):
    tensors["step"] = 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"lacks blocks\.0\.attn\.qkv\.bias and 1 more"),
        (_add, r"has the unknown lora\.weight;"),
        (_reshape, r"wrong shape: t_block\.1\.bias \[3\] \(expected \[864\]\)"),
        (_nan, r"holds NaN, infinity or integers: final_layer\.linear\.bias;"),
        (_compress, r"uses KV compression \(blocks\.1\.attn\.sr\.weight\)"),
        (_normalize, r"uses QK normalization \(blocks\.0\.attn\.q_norm\.weight\)"),
        (_table, r"pos_embed is \[1, 255, 144\]"),
        (_learned_table, r"not a sine-cosine table of one scale.*--interpolation-scale"),
        (_null, r"y_embedding of .* is \[120, 39\]"),
        (_not_pixart, r"not a PixArt transformer: 'x_embedder.proj.weight'"),
        (_not_a_tensor, r"no transformer's state dict: it holds step"),
    ],
)
def test_damaged_state_dicts_are_refused_in_one_line(tmp_path, original, damage, message):
    original = {name: tensor.clone() for name, tensor in original.items()}
    damage(original)
    path = save(tmp_path / "model.pth", {"state_dict": original})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_transformer(path, heads=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_truncated_files_are_refused_in_one_line(tmp_path, checkpoint, kept):
    write_pth(checkpoint, tmp_path / "model.pth")
    write_diffusers(checkpoint, tmp_path / "transformer")
    for path, asked in (
        (tmp_path / "model.pth", tmp_path / "model.pth"),
        (tmp_path / "transformer" / WEIGHTS, tmp_path / "transformer"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else kept])
        with pytest.raises(CheckpointError) as caught:
            read_transformer(asked)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "is of class SD3Transformer2DModel"),
        ({"norm_type": "ada_norm_zero"}, "has norm_type 'ada_norm_zero'"),
        ({"num_layers": 3}, r"lacks transformer_blocks\.2\.\S+ and 20 more"),
        ({"num_layers": 1}, r"has the unknown transformer_blocks\.1\.\S+ and 20 more"),
        ({"caption_channels": 41}, "wrong shape: caption_projection.linear_1.weight"),
        ({"caption_channels": None}, "wrong kind"),
        ({"_pixart_rt_cfg_null": "zeros"}, "wrong kind .*'zeros'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, checkpoint, change, message):
    write_diffusers(replace(checkpoint, y_embedding=None), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_transformer(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_indices_and_side_cars(tmp_path, checkpoint):
    write_diffusers(checkpoint, tmp_path)
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_transformer(tmp_path)
    index.write_text(json.dumps({"weight_map": {"proj_out.bias": "other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks other\.safetensors"):
        read_transformer(tmp_path)
    index.unlink()
    (tmp_path / "y_embedding.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"y_embedding\.safetensors is damaged"):
        read_transformer(tmp_path)


def test_a_safetensors_file_there_and_back(tmp_path, checkpoint):
    """With its settings: nothing has to be said to read it."""
    write_diffusers(replace(checkpoint, origin={"made": 1}), tmp_path / "t")
    convert(tmp_path / "t", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "u")
    for name in ("a.safetensors", "b.pth", "u"):
        found = read_transformer(tmp_path / name)
        assert_equal(found, checkpoint)
        assert found.origin == {"made": 1}
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


PREFIXES = (
    "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.", "model.diffusion_model.",
    "student.transformer.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_what_stands_before_every_name_is_taken_off(tmp_path, original, checkpoint, prefix, kind):
    if kind == "folder":
        write_diffusers(checkpoint, tmp_path)
        weights = {prefix + name: each for name, each in load_file(tmp_path / WEIGHTS).items()}
        save_file(weights, tmp_path / WEIGHTS)
        return assert_equal(replace(read_transformer(tmp_path), source="memory"), checkpoint)
    tensors = {prefix + name: each.contiguous() for name, each in original.items()}
    path = tmp_path / f"model.{kind}"
    if kind == "pth":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path)
    assert_equal(replace(read_transformer(path, heads=2), source="memory"), checkpoint)


def test_wrappers_inside_names_are_taken_off(tmp_path, original, checkpoint):
    """torch.compile and checkpointing of single blocks, FSDP around all."""
    inside = "._orig_mod._checkpoint_wrapped_module.attn."
    tensors = {
        "_fsdp_wrapped_module." + name.replace(".attn.", inside): each
        for name, each in original.items()
    }
    assert_equal(read_transformer(save(tmp_path / "a.pth", tensors), heads=2), checkpoint)


@pytest.mark.parametrize("key", ["model", "module", "ema", "model_state_dict"])
def test_the_state_dict_of_other_trainers(tmp_path, original, checkpoint, key):
    path = save(tmp_path / "a.pth", {key: original, "optimizer": {"lr": 0.1}, "step": 3})
    assert_equal(read_transformer(path, heads=2), checkpoint)


def test_the_transformer_of_a_whole_checkpoint(tmp_path, original, checkpoint):
    tensors = {f"model.diffusion_model.{name}": each for name, each in original.items()}
    others = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5.shared": torch.ones(2)}
    path = save(tmp_path / "a.pth", tensors | others)
    assert_equal(read_transformer(path, heads=2), checkpoint)


def test_several_models_in_one_file_are_refused(tmp_path, original):
    both = {f"{part}.{name}": each for part in ("model", "ema") for name, each in original.items()}
    with pytest.raises(CheckpointError, match=r"several models: .* after 'ema\.' and 'model\.'"):
        read_transformer(save(tmp_path / "a.pth", both), heads=2)
    with pytest.raises(CheckpointError, match=r"several state dicts, model and ema"):
        read_transformer(save(tmp_path / "b.pth", {"model": original, "ema": original}), heads=2)
    beside = {**{f"model.{name}": each for name, each in original.items()}, "loss.w": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"has the unknown loss\.w"):
        read_transformer(save(tmp_path / "c.pth", beside), heads=2)


def test_float8_weights_are_read_exactly(tmp_path, original):
    tensors = {name: each.to(torch.float8_e4m3fn) for name, each in original.items()}
    del tensors["pos_embed"], tensors["y_embedder.y_embedding"]
    save_file({n: each.contiguous() for n, each in tensors.items()}, tmp_path / "a.safetensors")
    state = read_transformer(tmp_path / "a.safetensors", heads=2, sample_size=32).state
    for name in ("blocks.0.attn.qkv.weight", "final_layer.linear.bias"):
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name].float(), tensors[name].float())


def test_an_unmerged_lora_is_named(tmp_path, original):
    tensors = {name.replace(".qkv.", ".qkv.base_layer."): each for name, each in original.items()}
    with pytest.raises(CheckpointError, match="a LoRA that is not merged"):
        read_transformer(save(tmp_path / "a.pth", tensors), heads=2)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        read_transformer(path)


def test_a_pickle_of_code_is_refused_without_advice_to_run_it(tmp_path):
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        read_transformer(save(tmp_path / "a.pth", {"state_dict": logging.getLogger("x")}))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_an_endless_name_is_refused_at_once(tmp_path, original, zipped):
    """PyTorch searches its own message about such a name in quadratic time: 20 s for 50,000."""
    torch.save(original, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert longest_name(tmp_path / "a.pth") < 60
    name, letters = b"torch._utils\n_rebuild", b"[" * 50_000
    if not zipped:
        data = (tmp_path / "a.pth").read_bytes().replace(name, name + letters, 1)
        (tmp_path / "b.pth").write_bytes(data)
    else:
        with (
            zipfile.ZipFile(tmp_path / "a.pth") as old,
            zipfile.ZipFile(tmp_path / "b.pth", "w") as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry).replace(name, name + letters, 1))
    assert longest_name(tmp_path / "b.pth") > 50_000
    with pytest.raises(CheckpointError, match="holds more than tensors; download it again"):
        read_transformer(tmp_path / "b.pth")


def test_missing_and_foreign_paths(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_transformer(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_transformer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read_transformer(tmp_path)
    write_diffusers(checkpoint, tmp_path / "t")
    with pytest.raises(CheckpointError, match="one file of a diffusers folder"):
        read_transformer(tmp_path / "t" / WEIGHTS)
    (tmp_path / "t" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_transformer(tmp_path / "t")


def test_the_null_convention_needs_its_embedding(tmp_path, checkpoint):
    write_diffusers(replace(checkpoint, y_embedding=None), tmp_path / "t")
    with pytest.raises(ConfigError, match="has no y_embedding, which cfg_null y-embedding needs"):
        read_transformer(tmp_path / "t", cfg_null=CfgNull.Y_EMBEDDING)


def test_no_y_embedding_is_invented(tmp_path, checkpoint):
    summary = write_pth(replace(checkpoint, y_embedding=None), tmp_path / "model.pth")
    written = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    assert "y_embedder.y_embedding" not in written
    assert "the source has none" in summary["dropped"][0]


def test_convert_refuses_what_it_should(tmp_path, checkpoint):
    write_diffusers(checkpoint, tmp_path / "t")
    convert(tmp_path / "t", tmp_path / "m.pth")
    with pytest.raises(ConfigError, match=r"exists; .* --force"):
        convert(tmp_path / "t", tmp_path / "m.pth")
    with pytest.raises(ConfigError, match=r"converts to a \.pth file"):
        convert(tmp_path / "t", tmp_path / "other")
    with pytest.raises(ConfigError, match="converts to a folder"):
        convert(tmp_path / "m.pth", tmp_path / "n.pth")
    with pytest.raises(ConfigError, match="converts to a \\.pth file or a \\.safetensors"):
        convert(tmp_path / "t", tmp_path / "n.zip")
    convert(tmp_path / "t", tmp_path / "m.pth", force=True)
    convert(tmp_path / "m.pth", tmp_path / "t", force=True)
    assert_equal(read_transformer(tmp_path / "t"), checkpoint)


def test_a_folder_that_is_no_transformer_is_never_replaced(tmp_path, checkpoint):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    write_pth(checkpoint, tmp_path / "m.pth")
    with pytest.raises(ConfigError, match="exists and is not a transformer folder"):
        convert(tmp_path / "m.pth", tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "a.txt").read_text() == "mine"


def test_a_failed_write_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    write_diffusers(checkpoint, tmp_path / "t")
    before = (tmp_path / "t" / WEIGHTS).read_bytes()
    monkeypatch.setattr("pixart_rt.checkpoints.transformer.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        write_diffusers(checkpoint, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_transformer(checkpoint, dtype):
    model = load_transformer(checkpoint, dtype)
    assert not model.training
    state = model.state_dict()
    assert state.keys() == checkpoint.state.keys()
    for name, tensor in checkpoint.state.items():
        assert torch.equal(state[name], tensor if dtype is None else tensor.to(dtype)), name
    pointers = {held["x_embedder.weight"].data_ptr() for held in (state, checkpoint.state)}
    assert len(pointers) == (1 if dtype is None else 2)  # no second copy of a large model
