"""Our DiT against a plain float64 one (conftest.py), and its checkpoints there and back."""

from __future__ import annotations

import argparse
import logging
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pixart_rt.checkpoints.dit import load_dit, read_dit, write_dit
from pixart_rt.config import Kernels
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.kernels import launch
from pixart_rt.kernels.checkpointing import policy
from pixart_rt.model.dit import DiT, DiTConfig, initialize_dit
from pixart_rt.model.embeddings import patchify, position_table, unpatchify

TOLERANCE = 1e-4  # the project's bound for a transformer in float32; outputs are near 1


@pytest.fixture(scope="module")
def state(random_dit):
    return random_dit()


@pytest.fixture
def path(tmp_path, state):
    torch.save(state, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def inputs(labels=True, side=8, seed=5):
    """Three images; the last label is the null one."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 4, side, side, generator=random),
        torch.tensor([999, 0, 501]),
        torch.tensor([0, 7, 10]) if labels else None,
    )


def run(model, latents, timestep, labels):
    config = model.config.backbone()
    side = latents.shape[-1] // 2
    table = position_table(config, (side, side))
    tokens = model(patchify(latents, 2).to(next(model.parameters()).dtype), table, timestep, labels)
    return unpatchify(tokens, (side, side), 2)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "class-free"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_matches_the_plain_dit(path, state, plain_dit, labels, dtype):
    model = load_dit(read_dit(path, heads=2), dtype)
    expected = plain_dit(state, heads=2)(*inputs(labels))
    tolerance = 1e-6 if dtype == torch.float64 else TOLERANCE  # positions are float32 in both
    actual = run(model, *inputs(labels))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("what", ["timestep", "labels", "latents"])
def test_the_comparison_sees_a_wrong_input(path, state, plain_dit, what):
    wrong = dict(zip(("latents", "timestep", "labels"), inputs(), strict=True))
    wrong[what] = wrong[what].flip(0)
    off = run(load_dit(read_dit(path, heads=2)), **wrong) - plain_dit(state, heads=2)(*inputs())
    assert off.abs().max() > 100 * TOLERANCE


def test_gradients_match_the_plain_dit(path, state, plain_dit):
    """Every parameter, the adaLN biases that reach the operators as tables among them."""
    model = load_dit(read_dit(path, heads=2), torch.float64)
    plain = plain_dit(state, heads=2)
    plain.state = {name: tensor.requires_grad_() for name, tensor in plain.state.items()}
    for output in (run(model, *inputs()), plain(*inputs())):
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, parameter in model.named_parameters():
        expected = plain.state[name.replace("x_embedder.", "x_embedder.proj.")].grad
        error = (parameter.grad.view_as(expected) - expected).norm() / expected.norm()
        assert error < 1e-6, name  # positions are float32


def test_fused_operators_match(path):
    """In Triton's interpreter, or on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_dit(read_dit(path, heads=2)).to(device)
    config = model.config.backbone()
    latents, timestep, labels = (each.to(device) for each in inputs())
    arguments = patchify(latents, 2), position_table(config, (4, 4)).to(device), timestep, labels
    with torch.no_grad():
        expected = model(*arguments)
        torch.testing.assert_close(
            model.use(Kernels.FUSED)(*arguments), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kernels", [Kernels.REFERENCE, Kernels.FUSED])
def test_bfloat16_autocast(path, state, plain_dit, kernels, monkeypatch):
    """As a trainer runs it: float32 weights and residual stream, bfloat16 products."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)  # the interpreter has no bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_dit(read_dit(path, heads=2)).to(device).use(kernels).train()
    with torch.autocast(device.type, torch.bfloat16):
        output = run(model, *(each.to(device) for each in inputs()))
    output.float().square().sum().backward()
    expected = plain_dit(state, heads=2)(*inputs())
    error = (output.double().cpu() - expected).norm() / expected.norm()
    assert 1e-4 < error < 3e-2, "8 bits of a product in each of a dozen linears, and not float32's"
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_checkpointed_blocks_give_the_same_gradients(path):
    """Selective activation checkpointing, as for the text model's blocks."""
    grads = []
    for checkpointed in (False, True):
        model = load_dit(read_dit(path, heads=2))
        if checkpointed:
            for block in model.blocks:
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False,
                    context_fn=partial(create_selective_checkpoint_contexts, policy),
                )  # fmt: skip
        run(model, *inputs()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_the_start_of_training_is_the_identity():
    model = initialize_dit(DiT(DiTConfig(num_classes=3, num_layers=2, num_heads=1, sample_size=8)))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[1], out)))
    latents, timestep, _ = inputs()
    assert not run(model, latents, timestep, torch.tensor([0, 1, 3])).any()
    assert len(seen) == 2
    for before, after in seen:
        assert before.abs().max() > 0.1
        assert torch.equal(before, after)
    for table in (model.t_embedder.mlp[0].weight, model.y_embedder.embedding_table.weight):
        assert 0.018 < table.std() < 0.022


def test_xl_2_has_the_published_number_of_parameters():
    """675,129,632 of DiT-XL/2 with its frozen position table of 256 x 1152."""
    with torch.device("meta"):
        model = DiT(DiTConfig())
    assert sum(p.numel() for p in model.parameters()) + 256 * 1152 == 675_129_632


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pt_there_and_back(tmp_path, state, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "a.pt")
    found = read_dit(tmp_path / "a.pt", heads=2)
    assert found.config == DiTConfig(num_classes=10, num_layers=3, num_heads=2, sample_size=8)
    write_dit(found, tmp_path / "b.pt")
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        if name == "pos_embed":  # computed again, in float32
            torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(written[name], tensor.to(dtype)), name
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_a_file_of_train_py(tmp_path, state):
    """Its arguments are a Namespace; the EMA is taken unless the other weights are asked."""
    ema = {name: tensor + (name != "pos_embed") for name, tensor in state.items()}
    loaded = {"model": state, "ema": ema, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}
    torch.save(loaded, tmp_path / "run.pt")
    for which, expected in ((None, ema), ("ema", ema), ("model", state)):
        found = read_dit(tmp_path / "run.pt", heads=2, which=which).state["blocks.2.mlp.fc1.bias"]
        assert torch.equal(found, expected["blocks.2.mlp.fc1.bias"])
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_weights_saved_under_distributed_data_parallel(tmp_path, state):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pt")
    assert read_dit(tmp_path / "ddp.pt", heads=2).config.num_layers == 3


def test_assumed_heads_are_said(tmp_path, caplog, random_dit):
    torch.save(random_dit(heads=16, head_dim=4, layers=1), tmp_path / "odd.pt")
    with caplog.at_level(logging.WARNING):
        assert read_dit(tmp_path / "odd.pt").config.num_heads == 16
    assert "16 heads were assumed, 4 channels each" in caplog.text


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


DAMAGES = {
    "missing": (lambda s: without(s, "blocks.1.mlp.fc2.bias"), "lacks blocks.1.mlp.fc2.bias"),
    "no label table": (
        lambda s: without(s, "y_embedder.embedding_table.weight"),
        "not a DiT.*embedding_table.weight",
    ),
    "no positions": (lambda s: without(s, "pos_embed"), "not a DiT.*pos_embed"),
    "unknown": (lambda s: s | {"blocks.0.extra": torch.zeros(1)}, "unknown blocks.0.extra"),
    "shape": (lambda s: s | {"blocks.0.attn.proj.bias": torch.zeros(3)}, "wrong shape: blocks.0"),
    "nan": (lambda s: s | {"final_layer.linear.bias": torch.full((32,), torch.nan)}, "holds NaN"),
    "learned positions": (lambda s: s | {"pos_embed": s["pos_embed"] + 1}, "not DiT's table"),
    "odd positions": (lambda s: s | {"pos_embed": s["pos_embed"][:, :13]}, "not DiT's table"),
    "text model": (lambda s: s | {"y_embedder.y_proj.fc1.weight": torch.zeros(1)}, "text model"),
    "not tensors": (lambda s: s | {"epoch": 3}, "it holds epoch"),
    "no block": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("blocks")},
        "num_layers must be positive",
    ),
    "empty": (lambda s: {}, "it holds nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_one_line(tmp_path, state, damage):
    change, message = DAMAGES[damage]
    torch.save(change(state), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_dit(tmp_path / "bad.pt", heads=2)
    assert "bad.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("code.pt", "text.pt"):
        with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
            read_dit(tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_dit(tmp_path / "absent.pt")


def test_flags_that_do_not_fit(path, tmp_path, state):
    for flags, message in (
        ({"heads": 7}, "7 heads do not divide the width 144"),
        ({"heads": 2, "which": "ema"}, "has plain tensors"),
        ({"which": "best"}, "choose from ema, model"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_dit(path, **flags)
    with pytest.raises(ConfigError, match="is a folder"):
        write_dit(read_dit(path, heads=2), tmp_path)
    with pytest.raises(ConfigError, match="num_classes"):
        DiTConfig(num_classes=0)
