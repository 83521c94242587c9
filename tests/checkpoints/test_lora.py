"""Merging adapters: the merged weights compute what the adapter does; what cannot be is refused.

The oracle is peft on diffusers' transformer, which here also makes adapters with an A of its own
for query, key and value, ranks by module and convolutions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints import tensor_names
from pixart_rt.checkpoints.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    merge,
    read_adapter,
    sampled_sha256,
)
from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
    write_diffusers,
)
from pixart_rt.config import ModelConfig
from pixart_rt.errors import CheckpointError
from pixart_rt.model.embeddings import patchify, position_table, unpatchify

CONFIG = ModelConfig(
    num_layers=2, num_heads=2, caption_channels=24, sample_size=32, interpolation_scale=1.0,
    micro_conditioning=False,
)  # fmt: skip
BLOCKS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
EVERYWHERE = [*BLOCKS, "proj_out", "proj", "linear", "linear_1", "linear_2"]  # the original code's


def diffusers_model(seed=0):
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, num_layers=2, cross_attention_dim=144,
        caption_channels=24, sample_size=32, use_additional_conditions=False,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=spread, generator=random)
    return theirs.eval()


def checkpoint_of(theirs):
    state = tensor_names.to_ours(
        theirs.state_dict(), CONFIG, tensor_names.diffusers_names, known=[], source="diffusers"
    )
    return TransformerCheckpoint(CONFIG, state, None, "diffusers")


def make_adapter(folder, **settings):
    """Train nothing, draw everything; returns peft's own model with the adapter."""
    adapted = get_peft_model(diffusers_model(), LoraConfig(**settings)).eval()
    random = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1, generator=random)
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def outputs(adapted, checkpoint):
    """What peft's model and a checkpoint give for the same inputs."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 20, 28, generator=random)
    text = torch.randn(2, 17, 24, generator=random)
    mask, t = torch.arange(17)[None] < torch.tensor([[3], [17]]), torch.tensor([999, 20])
    expected = adapted(
        latents, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip
    model = load_transformer(checkpoint)
    tokens = model(
        patchify(latents, 2), position_table(CONFIG, (10, 14)), model.modulator(t.float()), text,
        mask,
    )  # fmt: skip
    return unpatchify(tokens, (10, 14), 2), expected


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS},
        {"r": 3, "lora_alpha": 4, "target_modules": EVERYWHERE},
        {"r": 5, "lora_alpha": 7, "target_modules": ["to_q", "to_v"], "use_rslora": True},
        {
            "r": 4, "lora_alpha": 8, "target_modules": BLOCKS,
            "rank_pattern": {"to_k": 2, r"transformer_blocks\.1\.ff\.net\.2": 6},
            "alpha_pattern": {r"attn1\.to_out\.0": 3},
        },
    ],
    ids=["blocks", "everywhere", "rank-stabilised", "patterns"],
)  # fmt: skip
def test_merged_weights_compute_what_peft_computes(settings, tmp_path):
    adapted = make_adapter(tmp_path, **settings)
    base = checkpoint_of(diffusers_model())
    merged, expected = outputs(adapted, merge(base, read_adapter(tmp_path)))
    bare, _ = outputs(adapted, base)
    assert relative(bare, expected) > 0.03, "the adapter must matter"
    assert relative(merged, expected) < 1e-5


def test_scale_is_linear_in_the_weights(tmp_path):
    make_adapter(tmp_path, r=4, lora_alpha=8, target_modules=BLOCKS)
    base, adapter = checkpoint_of(diffusers_model()), read_adapter(tmp_path)
    name = "blocks.1.cross_attn.kv_linear.weight"
    whole = merge(base, adapter).state[name] - base.state[name]
    half = merge(base, adapter, 0.5).state[name] - base.state[name]
    assert whole.norm() > 0.1
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-6)
    nothing = merge(base, adapter, 0.0)
    assert all(torch.equal(nothing.state[each], base.state[each]) for each in base.state)


def test_a_half_precision_base_does_not_round_the_change_away(tmp_path):
    make_adapter(tmp_path, r=4, lora_alpha=8e-4, target_modules=BLOCKS)
    base, adapter = checkpoint_of(diffusers_model()), read_adapter(tmp_path)
    half = replace(base, state={name: tensor.bfloat16() for name, tensor in base.state.items()})
    merged = merge(half, adapter)
    assert {tensor.dtype for tensor in merged.state.values()} == {torch.float32}
    module = "transformer_blocks.0.attn1.to_out.0"
    change = merged.state["blocks.0.attn.proj.weight"] - half.state["blocks.0.attn.proj.weight"]
    assert relative(change, adapter.delta(module)) < 1e-2  # of changes near 1e-5 of the weights


def test_the_origin_says_what_was_merged(tmp_path):
    make_adapter(tmp_path / "lora", r=4, lora_alpha=8, target_modules=BLOCKS)
    base = replace(checkpoint_of(diffusers_model()), origin={"made_by": "a training run"})
    merged = merge(base, read_adapter(tmp_path / "lora"), 0.7)
    write_diffusers(merged, tmp_path / "merged")
    origin = read_transformer(tmp_path / "merged").origin
    assert origin is not None
    assert (origin["base"], origin["scale"]) == ("diffusers", 0.7)
    assert origin["adapter_sha256"] == sha256(tmp_path / "lora" / ADAPTER_WEIGHTS)
    assert origin["base_origin"] == {"made_by": "a training run"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "sound"
    make_adapter(folder, r=4, lora_alpha=8, target_modules=BLOCKS)
    return folder


@pytest.fixture
def adapter(sound, tmp_path):
    """A copy of a sound adapter, and a function that changes its settings or tensors."""
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)

    def change(settings=None, tensors=None):
        if settings is not None:
            config = json.loads((folder / ADAPTER_CONFIG).read_text())
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config | settings))
        if tensors is not None:
            found = load_file(folder / ADAPTER_WEIGHTS)
            save_file(tensors(found), folder / ADAPTER_WEIGHTS)
        return folder

    return change


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "uses bias = 'all'"),
        ({"modules_to_save": ["proj_out"]}, "uses modules_to_save"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights = 'pissa'"),
        ({"something_new": {"x": 1}}, "uses something_new"),
        ({"peft_type": "IA3"}, "type IA3; only LORA"),
        ({"r": 8}, "has rank 4, its settings say 8"),
        ({"lora_alpha": None}, "is damaged"),
    ],
)
def test_settings_that_merging_would_leave_out_are_refused(adapter, settings, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_adapter(adapter(settings))
    assert "\n" not in str(caught.value)


FIRST = "base_model.model.transformer_blocks.0.attn1.to_q."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {**t, "base_model.model.proj_out.lora_magnitude_vector": torch.ones(2)},
         "lora_magnitude_vector, which is no part of a LoRA"),
        (lambda t: {n: v for n, v in t.items() if n != FIRST + "lora_B.weight"}, "one half"),
        (lambda t: {**t, FIRST + "lora_B.weight": torch.ones(144, 3)}, "do not fit"),
        (lambda t: {**t, FIRST + "lora_A.weight": t[FIRST + "lora_A.weight"] * torch.nan}, "NaN"),
        (lambda t: {}, "holds no adapters"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(adapter, change, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_adapter(adapter(tensors=change))


def test_files_that_are_missing_or_truncated_are_refused(adapter, tmp_path):
    with pytest.raises(CheckpointError, match="is missing; give the folder of a LoRA"):
        read_adapter(tmp_path / "absent")
    folder = adapter()
    whole = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or not safetensors"):
        read_adapter(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model"):
        read_adapter(folder)
    (folder / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adapter(folder)


def test_an_adapter_of_another_model_is_refused(sound):
    """Fewer blocks: modules that are not there; another width: shapes."""
    adapter = read_adapter(sound)
    small = replace(CONFIG, num_layers=1)
    narrow = replace(CONFIG, num_heads=1)
    for config, reason in ((small, "which tiny does not have"), (narrow, "does not fit tiny")):
        shapes = tensor_names.expected_shapes(config)
        state = {name: torch.zeros(shape) for name, shape in shapes.items()}
        with pytest.raises(CheckpointError, match=reason) as caught:
            merge(TransformerCheckpoint(config, state, None, "tiny"), adapter)
        assert "\n" not in str(caught.value)
        assert "more" in str(caught.value)


def test_an_adapter_of_other_weights_is_refused(sound, caplog):
    """Their shapes agree; a float16 copy is the same model."""
    base, other = (checkpoint_of(diffusers_model(seed)) for seed in (0, 1))
    silent = read_adapter(sound)
    merge(other, silent)
    assert "does not say which weights it was trained on" in caplog.text
    caplog.clear()
    adapter = replace(silent, base_sha256=sampled_sha256(base.state))
    half = replace(base, state={name: each.half() for name, each in base.state.items()})
    for same in (base, half):
        merge(same, adapter)
    with pytest.raises(CheckpointError, match=r"was trained on other weights .* set `any_base`"):
        merge(other, adapter)
    merge(other, adapter, any_base=True)
    assert not caplog.text


def test_the_old_format_of_weights_is_read(sound, tmp_path):
    shutil.copy(sound / ADAPTER_CONFIG, tmp_path)
    torch.save(load_file(sound / ADAPTER_WEIGHTS), tmp_path / "adapter_model.bin")
    new, old = read_adapter(sound), read_adapter(tmp_path)
    assert new.pairs.keys() == old.pairs.keys()
    module = "transformer_blocks.1.attn2.to_k"
    assert torch.equal(new.delta(module), old.delta(module))


def kohya(name):
    return "lora_transformer_" + name.replace(".", "_")


def drawn(modules, names, *, rank=4, alpha=None):
    """A and B of every module and what they add, under a file's names. modules: name -> shape."""
    random = torch.Generator().manual_seed(3)
    tensors, deltas = {}, {}
    for module, (rows, columns) in modules.items():
        a = torch.randn(rank, columns, generator=random)
        b = torch.randn(rows, rank, generator=random)
        before, down, up = names
        name = before(module)
        tensors |= {name + down: a, name + up: b}
        if alpha is not None:
            tensors[name + ".alpha"] = torch.tensor(alpha)
        deltas[module] = (1.0 if alpha is None else alpha / rank) * (b @ a)
    return tensors, deltas


SQUARE = {f"transformer_blocks.{i}.attn1.to_{p}": (144, 144) for i in (0, 1) for p in "qkv"}
MORE = {"transformer_blocks.1.ff.net.0.proj": (576, 144), "proj_out": (32, 144),
        "transformer_blocks.0.attn2.to_out.0": (144, 144),
        "caption_projection.linear_1": (144, 24)}  # fmt: skip
FILES = {
    "diffusers": (lambda m: f"transformer.{m}", ".lora_A.weight", ".lora_B.weight"),
    "old diffusers": (lambda m: f"transformer.{m}", ".lora.down.weight", ".lora.up.weight"),
    "plain": (lambda m: m, ".lora_A.weight", ".lora_B.weight"),
    "kohya": (kohya, ".lora_down.weight", ".lora_up.weight"),
    "kohya unet": (lambda m: kohya(m).replace("transformer_", "unet_", 1), ".lora_down.weight",
                   ".lora_up.weight"),
    "comfy": (lambda m: f"diffusion_model.{m}", ".lora_up.weight", ".lora_down.weight"),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("layout", FILES)
def test_files_of_other_programs_add_what_they_hold(layout, alpha, tmp_path):
    """Exact in float32: B A, times alpha / r where the file has one."""
    before, down, up = FILES[layout]
    if layout == "comfy":
        down, up = up, down
    tensors, deltas = drawn(SQUARE | MORE, (before, down, up), alpha=alpha)
    save_file(tensors, tmp_path / "any.safetensors")
    base = checkpoint_of(diffusers_model())
    merged = merge(base, read_adapter(tmp_path / "any.safetensors"))
    before, after = (
        tensor_names.from_ours(each.state, CONFIG, tensor_names.diffusers_names)
        for each in (base, merged)
    )
    for name, tensor in before.items():
        delta = deltas.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = tensor if delta is None else tensor + delta.view_as(tensor)
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("flat", [False, True])
def test_a_packed_linear_of_the_original_names_is_cut_into_its_parts(flat, tmp_path):
    modules = {"blocks.1.attn.qkv": (432, 144), "blocks.0.cross_attn.kv_linear": (288, 144),
               "final_layer.linear": (32, 144), "y_embedder.y_proj.fc1": (144, 24)}  # fmt: skip
    names = kohya if flat else (lambda name: name)
    tensors, deltas = drawn(modules, (names, ".lora_down.weight", ".lora_up.weight"), alpha=1.0)
    save_file(tensors, tmp_path / "any.safetensors")
    base = checkpoint_of(diffusers_model())
    merged = merge(base, read_adapter(tmp_path / "any.safetensors"))
    for name, delta in deltas.items():
        ours = name.replace("y_embedder.", "") + ".weight"
        torch.testing.assert_close(merged.state[ours], base.state[ours] + delta, rtol=0, atol=1e-5)
    changed = {name for name, tensor in merged.state.items()
               if not torch.equal(tensor, base.state[name])}  # fmt: skip
    assert changed == {name.replace("y_embedder.", "") + ".weight" for name in deltas}


def test_a_folder_of_diffusers_and_its_metadata(tmp_path):
    """alpha and patterns come from the metadata that diffusers keeps with the tensors."""
    tensors, deltas = drawn(SQUARE, FILES["diffusers"])
    told = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.peft_type": "LORA",
            "transformer.alpha_pattern": {"to_k": 2}, "transformer.use_dora": False}  # fmt: skip
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(told)})
    adapter = read_adapter(tmp_path)
    for module, delta in deltas.items():
        factor = 0.5 if module.endswith("to_k") else 2
        torch.testing.assert_close(adapter.delta(module), factor * delta)
    told["transformer.use_dora"] = True
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(CheckpointError, match="uses use_dora"):
        read_adapter(tmp_path)


def test_peft_without_its_prefix_is_what_peft_says(sound, tmp_path):
    shutil.copy(sound / ADAPTER_CONFIG, tmp_path)
    tensors = load_file(sound / ADAPTER_WEIGHTS)
    save_file({name.removeprefix("base_model.model."): each for name, each in tensors.items()},
              tmp_path / ADAPTER_WEIGHTS)  # fmt: skip
    expected, found = read_adapter(sound), read_adapter(tmp_path / ADAPTER_WEIGHTS)
    assert found.scales == expected.scales
    for module in expected.pairs:
        assert torch.equal(found.delta(module), expected.delta(module))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"text_encoder.layer.q.lora_A.weight": torch.ones(4, 8)}, "adapts the text encoder"),
        ({"lora_te1_layer_q.lora_down.weight": torch.ones(4, 8)}, "adapts the text encoder"),
        ({kohya("proj_out") + ".dora_scale": torch.ones(2)}, "dora_scale, which is no part"),
        ({kohya("proj_out") + ".hada_w1_a": torch.ones(2)}, "hada_w1_a, which is no part"),
        ({kohya("proj_out") + ".alpha": torch.ones(1)}, "one half of the adapter"),
        ({kohya("proj_out") + ".alpha": torch.tensor(torch.nan)}, "holds NaN"),
        ({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 144),
          "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(144, 4)},
         "two adapters of transformer_blocks"),
    ],
)  # fmt: skip
def test_files_of_more_than_lora_are_refused(extra, reason, tmp_path):
    tensors, _ = drawn(SQUARE, FILES["kohya"])
    save_file(tensors | extra, tmp_path / "any.safetensors")
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_adapter(tmp_path / "any.safetensors")
    assert "\n" not in str(caught.value)


def test_pefts_file_without_its_settings_is_refused(sound, tmp_path):
    shutil.copy(sound / ADAPTER_WEIGHTS, tmp_path / "renamed.safetensors")
    with pytest.raises(CheckpointError, match="which says the alpha"):
        read_adapter(tmp_path / "renamed.safetensors")
    shutil.copy(sound / ADAPTER_WEIGHTS, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / "renamed.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path / ADAPTER_WEIGHTS)
