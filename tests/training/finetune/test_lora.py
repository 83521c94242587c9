"""LoRA on the packed transformer: seen by all operators, and the same through peft on diffusers'.

The oracles are peft with diffusers' transformer, and the plain formula W + s B A.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from pixart_rt.checkpoints import tensor_names
from pixart_rt.config import Kernels, ModelConfig, Quality
from pixart_rt.errors import ConfigError
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.model.text_kv import TextSide
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.finetune.lora import add_lora, lora_state, save_lora
from pixart_rt.training.finetune.settings import LoraSettings, LoraTargets

CONFIG = ModelConfig(
    num_layers=2, num_heads=2, caption_channels=24, sample_size=32, interpolation_scale=1.0,
    micro_conditioning=False,
)  # fmt: skip
SETTINGS = [
    LoraSettings(rank=3, alpha=5.0),
    LoraSettings(rank=4, alpha=4.0, targets=LoraTargets.ALL),
]


def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter random: a B of zeros would hide what is lost."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=spread, generator=random)


def random_model(settings=None, seed=0):
    model = PixArtTransformer(CONFIG)
    randomize(model, seed)
    if settings is not None:
        add_lora(model, settings)
        random = torch.Generator().manual_seed(seed + 1)
        for tensor in lora_state(model).values():
            tensor.normal_(std=0.1, generator=random)
    return model.eval()


def diffusers_model(state):
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, num_layers=2, cross_attention_dim=144,
        caption_channels=24, sample_size=32, use_additional_conditions=False,
    )  # fmt: skip
    found = theirs.load_state_dict(
        tensor_names.from_ours(state, CONFIG, tensor_names.diffusers_names), strict=False
    )
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"pos_embed.pos_embed"}
    return theirs.eval()


def inputs(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, 4, 20, 28, generator=random),
        "text": torch.randn(2, 17, 24, generator=random),
        "mask": torch.arange(17)[None] < torch.tensor([[3], [17]]),
        "t": torch.tensor([999, 20]),
    }


def ours_on(model, given):
    tokens = model(
        patchify(given["latents"], 2), position_table(CONFIG, (10, 14)),
        model.modulator(given["t"].float()), given["text"], given["mask"],
    )  # fmt: skip
    return unpatchify(tokens, (10, 14), 2)


def theirs_on(model, given):
    return model(
        given["latents"], encoder_hidden_states=given["text"],
        encoder_attention_mask=given["mask"], timestep=given["t"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip


def relative(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_a_saved_adapter_is_the_same_in_peft_on_diffusers(settings, tmp_path):
    model, given = random_model(settings), inputs()
    save_lora(tmp_path / "lora", lora_state(model), settings, base="some/model")
    base = random_model().state_dict()
    theirs = diffusers_model(base)
    plain = theirs_on(theirs, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for a hub's config of the named base model
        adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "lora")).eval()
    expected = theirs_on(adapted, given)
    assert relative(plain, expected) > 0.05, "the adapter must matter"
    assert relative(ours_on(model, given), expected) < 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
def test_fused_operators_see_the_adapter(settings):
    """Outputs, and the gradient of every adapter, in Triton's interpreter or on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(settings).to(device)
    given = {name: tensor.to(device) for name, tensor in inputs().items()}
    outputs, gradients = [], []
    for kernels in (Kernels.REFERENCE, Kernels.FUSED):
        model.use(kernels)
        model.zero_grad()
        output = on_device(model, given)
        output.square().mean().backward()
        outputs.append(output)
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    with torch.no_grad():
        bare = on_device(random_model().to(device), given)
    assert relative(outputs[0], bare) > 0.05
    assert relative(outputs[1], outputs[0]) < 1e-5
    assert gradients[0].keys() == lora_state(model).keys()
    for name, expected in gradients[0].items():
        assert expected.norm() > 0, name
        assert relative(gradients[1][name], expected) < 5e-5, name


def on_device(model, given):
    positions = position_table(CONFIG, (10, 14)).to(given["latents"])
    modulation = model.modulator(given["t"].float())
    return model(patchify(given["latents"], 2), positions, modulation, given["text"], given["mask"])


@pytest.mark.parametrize("kernels", [Kernels.REFERENCE, Kernels.FUSED])
def test_operators_see_the_adapter_under_autocast(kernels, no_kernels):
    """bfloat16 keeps 8 bits: the error is a few 2**-9, the adapter's own effect far larger."""
    model, given = random_model(SETTINGS[1]), inputs()
    with torch.no_grad():
        expected = ours_on(model.use(Kernels.REFERENCE), given)
        with torch.autocast("cpu", torch.bfloat16):
            actual = ours_on(model.use(kernels), given)
    assert relative(actual, expected) < 3e-2


def test_an_adapter_starts_as_nothing_and_only_it_learns():
    model, bare = random_model(), random_model()
    add_lora(model, SETTINGS[0], seed=3)
    with torch.no_grad():
        assert torch.equal(ours_on(model, inputs()), ours_on(bare, inputs()))
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == lora_state(model).keys()
    assert len(learning) == 2 * 5 * CONFIG.num_layers
    assert all(p.dtype == torch.float32 for p in lora_state(model).values())
    again, other = random_model(), random_model()
    torch.manual_seed(7)  # the global generator has no say
    add_lora(again, SETTINGS[0], seed=3)
    add_lora(other, SETTINGS[0], seed=4)
    first = "blocks.0.attn.qkv.lora_A.default.weight"
    assert torch.equal(lora_state(again)[first], lora_state(model)[first])
    assert not torch.equal(lora_state(other)[first], lora_state(model)[first])


def test_adapters_are_float32_in_a_half_precision_model():
    model = random_model().bfloat16()
    add_lora(model, SETTINGS[0])
    assert {p.dtype for p in lora_state(model).values()} == {torch.float32}
    with torch.no_grad():
        output = model(
            patchify(inputs()["latents"], 2), position_table(CONFIG, (10, 14)),
            torch.randn(2, 7, CONFIG.hidden_size), inputs()["text"], inputs()["mask"],
        )  # fmt: skip
    assert output.dtype == torch.bfloat16


def test_what_reads_weights_alone_refuses_an_adapter():
    model = random_model(SETTINGS[0])
    with pytest.raises(ConfigError, match=r"0\.attn\.qkv carries an adapter.*merge"):
        model.use(Kernels.FUSED, Quality.FAST)
    with pytest.raises(ConfigError, match="carries an adapter"):
        TextSide.of(model)
    TextSide.of(random_model())
    with pytest.raises(ConfigError, match="that has one"):
        add_lora(model, SETTINGS[0])


def test_the_files_are_what_peft_writes(tmp_path):
    settings = SETTINGS[0]
    model, folder = random_model(settings), tmp_path / "lora"
    save_lora(folder, lora_state(model), settings, origin={"prompt": "a photo of sks dog"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"], (
        "nothing is left next to it"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "origin.json", "pixart_rt.json",
    ]  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5.0)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4 * CONFIG.num_layers  # A and B; two attentions; q, k, v, out
    name = "base_model.model.transformer_blocks.1.attn2.to_v.lora_B.weight"
    expected = lora_state(model)["blocks.1.cross_attn.kv_linear.lora_B.default.weight"][144:]
    assert torch.equal(tensors[name], expected)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    model, mine = random_model(SETTINGS[0]), tmp_path / "mine"
    mine.mkdir()
    save_lora(mine, lora_state(model), SETTINGS[0])
    save_lora(mine, lora_state(model), SETTINGS[0])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not an adapter folder"):
        save_lora(tmp_path / "photos", lora_state(model), SETTINGS[0])
    assert (tmp_path / "photos" / "dog.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="must be > 0"):
        LoraSettings(**wrong)


def test_a_compiled_block_compiles_once_for_all_token_counts(no_kernels):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = random_model(SETTINGS[0]).use(Kernels.FUSED)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows, columns in ((10, 14), (9, 16), (8, 8), (7, 20)):
        tokens = torch.randn(2, rows * columns, 16)
        given = (
            tokens, position_table(CONFIG, (rows, columns)), torch.randn(2, 7, 144),
            inputs()["text"], inputs()["mask"],
        )  # fmt: skip
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
