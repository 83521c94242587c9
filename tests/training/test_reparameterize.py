"""The text model against the class-free DiT at the chosen timestep: the plain one of conftest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pixart_rt.checkpoints.dit import read_dit
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.config import CfgNull
from pixart_rt.errors import ConfigError
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.training.reparameterize import reparameterize, reparameterize_file
from pixart_rt.training.reparameterize_settings import TBlock, TextStart

CAPTION_CHANNELS = 24


@pytest.fixture(scope="module")
def state(random_dit):
    return random_dit(layers=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory, state):
    file = tmp_path_factory.mktemp("dit") / "dit.pt"
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def dit(path):
    return read_dit(path, heads=2)


def start(**settings):
    return TextStart(caption_channels=CAPTION_CHANNELS, max_text_tokens=9, **settings)


def run(checkpoint, latents, t, dtype=torch.float32):
    """The text model's output and x after each block, on random text of 1 to 9 tokens."""
    model = load_transformer(checkpoint, dtype)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    B, side = len(latents), latents.shape[-1] // 2
    text = torch.randn(B, 9, CAPTION_CHANNELS, generator=torch.Generator().manual_seed(8))
    mask = torch.arange(9)[None] < torch.randint(1, 10, (B, 1))
    with torch.no_grad():
        modulation = model.modulator(torch.full((B,), float(t)))
        table = position_table(checkpoint.config, (side, side))
        tokens = model(patchify(latents, 2).to(dtype), table, modulation, text.to(dtype), mask)
    return unpatchify(tokens, (side, side), 2), seen


def latents(side=8, seed=4):
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(seed))


def of_plain(plain_dit, state, x, t, pos_embed=None):
    plain = plain_dit(state, heads=2)
    output = plain(x, torch.full((len(x),), t), None, pos_embed)
    return output, plain.blocks


@pytest.mark.parametrize("t_block", TBlock)
@pytest.mark.parametrize("t", [500, 0, 999])
def test_every_block_is_the_class_free_dits(t_block, t, dit, state, plain_dit):
    """In float64 and float32: what remains is the rounding of the tables to float32."""
    checkpoint = reparameterize(dit, start(t=t, t_block=t_block))
    expected, blocks = of_plain(plain_dit, state, latents(), t)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        output, seen = run(checkpoint, latents(), t, dtype)
        assert len(seen) == len(blocks) == 3
        for found, wanted in zip([*seen, output], [*blocks, expected], strict=True):
            torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


def test_elsewhere_it_is_not(dit, state, plain_dit):
    """Guards the test above: another timestep or the label's term is far outside its tolerance."""
    x = latents()
    output, _ = run(reparameterize(dit, start()), x, 500)
    plain = plain_dit(state, heads=2)
    others = [
        plain(x, torch.tensor([500, 500]), torch.tensor([10, 10])),  # the null label's embedding
        plain(x, torch.tensor([501, 501]), None),
    ]
    for other in others:
        assert (output - other).abs().max() > 1e-2
    moved, _ = run(reparameterize(dit, start()), x, 400)
    assert (moved - of_plain(plain_dit, state, x, 400)[0]).abs().max() > 1e-2
    assert (moved - output).abs().max() > 1e-2, "the shared modulation still follows the time"


def test_what_each_t_block_is(dit, state):
    linears = torch.stack([state[f"blocks.{i}.adaLN_modulation.1.weight"] for i in range(3)])
    made = {choice: reparameterize(dit, start(t_block=choice)).state for choice in TBlock}
    weight = {choice: made[choice]["modulator.t_block.1.weight"] for choice in TBlock}
    torch.testing.assert_close(weight[TBlock.MEAN], linears.mean(0))
    assert torch.equal(weight[TBlock.BLOCK0], linears[0])
    assert not made[TBlock.BLOCK0]["blocks.0.scale_shift_table"].any()
    assert 0.0195 < weight[TBlock.RANDOM].std() < 0.0205
    assert not made[TBlock.RANDOM]["modulator.t_block.1.bias"].any()
    mean = torch.stack([made[TBlock.MEAN][f"blocks.{i}.scale_shift_table"] for i in range(3)])
    torch.testing.assert_close(mean.mean(0), torch.zeros_like(mean[0]), atol=1e-6, rtol=0)


def test_text_has_no_influence_but_gets_gradients(dit):
    checkpoint = reparameterize(dit, start())
    model = load_transformer(checkpoint)
    for block in model.blocks:
        assert not block.cross_attn.proj.weight.any() and not block.cross_attn.proj.bias.any()
        for linear in (block.cross_attn.q_linear, block.cross_attn.kv_linear):
            assert linear.weight.std() > 0.01 and not linear.bias.any()
    assert 0.015 < model.y_proj.fc1.weight.std() < 0.025
    table = position_table(checkpoint.config, (4, 4))
    arguments = patchify(latents(), 2), table, model.modulator(torch.tensor([3.0, 7.0]))
    text = torch.randn(2, 2, 9, CAPTION_CHANNELS)
    mask = torch.ones(2, 9, dtype=torch.bool)
    outputs = [model(*arguments, each, mask) for each in text]
    assert torch.equal(*outputs)
    outputs[0].square().sum().backward()
    assert model.blocks[0].cross_attn.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("scale", "step"), [(None, 0.5), (1.0, 1.0)], ids=["DiffFit", "as DiT"])
def test_positions_of_another_resolution(dit, state, plain_dit, plain_positions, scale, step):
    """Twice the side: positions 0, 0.5, 1... by default, the DiT's own 0, 1, 2... with scale 1."""
    checkpoint = reparameterize(dit, start(sample_size=16, interpolation_scale=scale))
    assert checkpoint.config.sample_size == 16
    table = plain_positions(144, 8, step)
    expected, _ = of_plain(plain_dit, state, latents(16), 500, table)
    output, _ = run(checkpoint, latents(16), 500)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "model.pth"])
@pytest.mark.parametrize("null", CfgNull)
def test_the_file_is_a_transformer_with_its_settings(tmp_path, path, dit, name, null):
    asked = start(t=321, t_block=TBlock.RANDOM, cfg_null=null, sample_size=16, seed=5)
    summary = reparameterize_file(path, tmp_path / name, asked, heads=2)
    found = read_transformer(tmp_path / name)
    expected = reparameterize(dit, asked)
    assert found.config == expected.config
    assert found.config.cfg_null is null and found.config.interpolation_scale == 2
    assert found.state.keys() == expected.state.keys()
    for key, tensor in expected.state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(found.state[key], tensor), key
    assert (found.y_embedding is None) == (null is not CfgNull.Y_EMBEDDING)
    if found.y_embedding is not None:
        assert torch.equal(found.y_embedding, expected.y_embedding)
        assert 0.15 < found.y_embedding.std() < 0.25  # 1 / sqrt(24) = 0.2
    origin = found.origin
    assert origin == summary["origin"]
    assert (origin["t"], origin["t_block"], origin["seed"]) == (321, "random", 5)
    assert origin["dit"] == "dit.pt" and len(origin["dit_sha256"]) == 64


def test_diffusers_loads_the_folder(tmp_path, path, state, plain_dit):
    """diffusers' transformer draws the class-free DiT too."""
    from diffusers import PixArtTransformer2DModel

    reparameterize_file(path, tmp_path / "transformer", start(), heads=2)
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        output = model(
            latents(),
            encoder_hidden_states=torch.randn(2, 9, CAPTION_CHANNELS),
            timestep=torch.tensor([500, 500]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    expected, _ = of_plain(plain_dit, state, latents(), 500)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_weights_become_float32(tmp_path, state, plain_dit):
    """The tables are sums that half precision would round; so is nothing else."""
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(half, tmp_path / "half.pt")
    checkpoint = reparameterize(read_dit(tmp_path / "half.pt", heads=2), start())
    half["pos_embed"] = state["pos_embed"]
    output, _ = run(checkpoint, latents(), 500)
    expected, _ = of_plain(plain_dit, half, latents(), 500)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_seeds_give_equal_weights(dit):
    one, same = (reparameterize(dit, start()).state for _ in range(2))
    other = reparameterize(dit, replace(start(), seed=1)).state
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["y_proj.fc1.weight"], other["y_proj.fc1.weight"])


def test_what_cannot_be_is_refused(tmp_path, path, dit):
    for t in (-1, 1000):
        with pytest.raises(ConfigError, match="between 0 and 999"):
            start(t=t)
    for settings in ({"interpolation_scale": 0.0}, {"sample_size": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be"):
            reparameterize(dit, start(**settings))
    taken = tmp_path / "taken.pth"
    taken.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="--force"):
        reparameterize_file(path, taken, start(), heads=2)
    assert taken.read_bytes() == b"mine"
    reparameterize_file(path, taken, start(), heads=2, force=True)
    assert read_transformer(taken).config.num_layers == 3
