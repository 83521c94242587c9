"""The optimisers by name: near each other, saved and loaded exactly, unmoved by NaN."""

from __future__ import annotations

import builtins
import importlib.util
import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.training.optim.clipping import clip_gradients, step_if_finite
from pixart_rt.training.optim.factory import make_optimizer
from pixart_rt.training.optim.learning_rate import set_lr
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import OptimizerKind

KINDS = list(OptimizerKind)
LR = 3e-3


@pytest.fixture(autouse=True)
def eager_update(monkeypatch):
    """torchao's update without Inductor: seconds of compiling less, the same arithmetic. One test
    below runs it compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


def regression(seed=0):
    """A model whose first weight has 8-bit moments (64 x 128 numbers) and whose others have not."""
    random = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 3))
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=random)
    x = torch.randn(256, 128, generator=random)
    y = torch.tanh(x @ torch.randn(128, 3, generator=random) / 11)
    return model, x, y


def train(model, optimizer, x, y, steps, start=0):
    """Losses of `steps` steps of minibatches; every seventh is poisoned and must be skipped."""
    losses = []
    for step in range(start, start + steps):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        if step % 7 == 6:
            model[0].weight.grad[0, 0] = math.nan
        step_if_finite(optimizer, clip_gradients(model.parameters(), 1.0)[1])
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(model, optimizer):
    """Every number of weights and state, 8-bit codes and scales as they are."""
    found = [parameter.detach().clone() for parameter in model.parameters()]
    for state in optimizer.state.values():
        for value in state.values():
            parts = value.__tensor_flatten__()[0] if hasattr(value, "codes") else []
            found += [getattr(value, name).clone() for name in parts]
            if not parts:
                found.append(torch.as_tensor(value).clone())
    return found


def test_8_bits_stay_near_32():
    """Signed codes are spaced by up to 1/127 of a block's largest number, so a first moment is off
    by some per cent of a typical one; a step of Adam is lr whatever the gradient, and errors of
    many steps cancel in part. So after 50 steps the ways may differ by a twentieth of their length
    (0.02 was found), and the losses by a twentieth of what they fell."""
    results = {}
    for kind in (OptimizerKind.ADAMW, OptimizerKind.ADAMW_8BIT):
        model, x, y = regression()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = make_optimizer(kind, model.parameters(), LR, 0.01)
        losses = train(model, optimizer, x, y, 50)
        way = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        results[kind] = losses, torch.cat([each.flatten() for each in way])
        codes = [hasattr(s["exp_avg"], "codes") for s in optimizer.state.values()]
        assert codes == ([False] * 4 if kind is OptimizerKind.ADAMW else [True, *[False] * 3])
    (exact, moved), (ours, ours_moved) = results.values()
    assert exact[-1] < 0.3 * exact[0], "nothing was learned; the comparison says nothing"
    assert (moved - ours_moved).norm() < 0.05 * moved.norm()
    assert abs(ours[-1] - exact[-1]) < 0.05 * (exact[0] - exact[-1])
    assert not torch.equal(moved, ours_moved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_exactly(kind):
    model, x, y = regression()
    optimizer = make_optimizer(kind, model.parameters(), LR, 0.01)
    train(model, optimizer, x, y, 9)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        assert all(type(value) is torch.Tensor for value in state.values()), (
            "checkpoints take these"
        )

    again, _, _ = regression(seed=1)
    resumed = make_optimizer(kind, again.parameters(), 1.0, 0.5)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for old, new in zip(tensors(model, optimizer), tensors(again, resumed), strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)
    assert train(again, resumed, x, y, 6, 9) == train(model, optimizer, x, y, 6, 9)
    for old, new in zip(tensors(model, optimizer), tensors(again, resumed), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(kind, poison, first):
    model, x, y = regression()
    optimizer = make_optimizer(kind, model.parameters(), LR, 0.01)
    if not first:
        train(model, optimizer, x, y, 3)
    before = tensors(model, optimizer)
    model(x).square().mean().backward()
    model[2].bias.grad[1] = poison
    step_if_finite(optimizer, clip_gradients(model.parameters(), 1.0)[1])
    after = tensors(model, optimizer)
    if first:  # fused AdamW and CAME have made their state, of zeros
        assert all(not each.any() for each in after[4:] if each.dtype == torch.float32)
        after = after[:4]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    optimizer.zero_grad()
    losses = train(model, optimizer, x, y, 6, 7)
    assert all(math.isfinite(each) for each in losses)
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_can_be_changed(kind):
    """AdamW8bit refuses a rate that is no tensor; set_lr fills the one it has."""
    model, x, y = regression()
    optimizer = make_optimizer(kind, model.parameters(), LR, 0.01)
    train(model, optimizer, x, y, 2)
    set_lr(optimizer, 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, x, y, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    set_lr(optimizer, LR)
    train(model, optimizer, x, y, 1)
    assert not torch.equal(before[0], model[0].weight)


def test_compiled_8_bit_updates_are_the_eager_ones(monkeypatch):
    """As torchao runs it: Inductor fuses products and sums, so results may differ by roundings, and
    a code where they cross a boundary."""
    eager, x, y = regression()
    first = make_optimizer(OptimizerKind.ADAMW_8BIT, eager.parameters(), LR, 0.01)
    train(eager, first, x, y, 4)
    monkeypatch.undo()
    compiled, _, _ = regression()
    second = make_optimizer(OptimizerKind.ADAMW_8BIT, compiled.parameters(), LR, 0.01)
    train(compiled, second, x, y, 4)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1 * LR)


def test_a_run_with_8_bit_moments_goes_on_exactly(tmp_path):
    """Through the trainer's own checkpoints, which are written aside while it computes."""
    spec = importlib.util.spec_from_file_location(
        "small_run", Path(__file__).parents[1] / "small_run.py"
    )
    small_run = sys.modules["small_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_run)

    def run(out, steps, ranks):
        kind = OptimizerKind.ADAMW_8BIT
        trainer = small_run.make_trainer(tmp_path / out, steps, ranks, optimizer=kind)
        trainer.run()
        return tensors(trainer.objective, trainer.optimizer)

    with start_ranks("cpu") as ranks:
        whole = run("whole", 4, ranks)
        run("parts", 2, ranks)
        resumed = run("parts", 4, ranks)
    assert sum(each.dtype == torch.uint8 for each in whole) > 20
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_divided_parameters_are_refused():
    with start_ranks("cpu"):
        model, _, _ = regression()
        fully_shard(model)
        with pytest.raises(ConfigError, match=r"divided over ranks \(FSDP\); use DDP"):
            make_optimizer(OptimizerKind.ADAMW_8BIT, model.parameters(), 0.1, 0.0)


def test_settings_reach_the_optimiser():
    model, _, _ = regression()
    adamw = make_optimizer(OptimizerKind.ADAMW, model.parameters(), 0.1, 0.2, (0.3, 0.4), 1e-10)
    assert isinstance(adamw, torch.optim.AdamW)
    group = adamw.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (
        0.1, 0.2, (0.3, 0.4), 1e-10
    )  # fmt: skip
    assert group["fused"]
    came = make_optimizer(OptimizerKind.CAME, model.parameters(), 0.1, 0.0)
    assert came.param_groups[0]["betas"] == (0.9, 0.999, 0.9999)
    assert came.param_groups[0]["eps"] == (1e-30, 1e-16)
    frozen = [{"params": list(model[0].parameters()), "weight_decay": 0.0},
              {"params": list(model[2].parameters())}]  # fmt: skip
    groups = make_optimizer(OptimizerKind.ADAMW_8BIT, frozen, 0.1, 0.2).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]


def test_what_cannot_be_is_said(monkeypatch):
    model, _, _ = regression()
    with pytest.raises(ConfigError, match="came takes 3 betas, got"):
        make_optimizer(OptimizerKind.CAME, model.parameters(), 0.1, 0.0, (0.9, 0.999))
    with pytest.raises(ConfigError, match="adamw takes 1 eps, got"):
        make_optimizer(OptimizerKind.ADAMW, model.parameters(), 0.1, 0.0, eps=(1e-30, 1e-16))
    for settings in ({"lr": -1.0, "weight_decay": 0.0}, {"lr": 1.0, "weight_decay": -1.0},
                     {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 1.0)},
                     {"lr": math.nan, "weight_decay": 0.0}):  # fmt: skip
        with pytest.raises(ConfigError, match="adamw8bit got lr"):
            make_optimizer(OptimizerKind.ADAMW_8BIT, model.parameters(), **settings)

    real = builtins.__import__

    def without_torchao(name, *rest):
        if name.startswith("torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "pixart_rt.training.optim.adamw8bit", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(BackendError, match=r"torchao cannot be imported .*pixart_rt\[quant\]"):
        make_optimizer(OptimizerKind.ADAMW_8BIT, model.parameters(), 0.1, 0.0)
