"""Clipping against torch's own, and steps that are not finite: nothing moves, nothing waits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.came import CAME
from pixart_rt.training.optim.clipping import clip_gradients, step_if_finite


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    model(torch.randn(5, 6)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.to(request.param)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.to(request.param)
    return model


class Syncs(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_a_host_that_waits():
    with Syncs() as syncs:
        torch.ones(2).sum().item()
    assert syncs.count == 1


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_gradients_are_clipped_as_by_torch(model, max_norm):
    reference = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    exact = sum((p.grad.double() ** 2).sum() for p in model.parameters()) ** 0.5
    with Syncs() as syncs:
        norm, found_inf = clip_gradients(model.parameters(), max_norm)
    assert syncs.count == 0
    assert torch.equal(norm, expected) and norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert norm.shape == found_inf.shape == () and found_inf.item() == 0
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    after = sum((p.grad.double() ** 2).sum() for p in model.parameters()) ** 0.5
    assert after <= max_norm


def optimizers(model):
    return {
        "AdamW": torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.03, fused=True),
        "CAME": CAME(model.parameters(), lr=0.1, weight_decay=0.03),
    }


def snapshot(model, optimizer):
    moments = [
        value.clone()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    return [p.detach().clone() for p in model.parameters()] + moments


@pytest.mark.parametrize("name", ["AdamW", "CAME"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(model, name, poison):
    optimizer = optimizers(model)[name]
    for _ in range(2):
        step_if_finite(optimizer, clip_gradients(model.parameters(), 1.0)[1])
    before = snapshot(model, optimizer)
    good = [p.grad.clone() for p in model.parameters()]
    model[1].weight.grad[1, 2] = poison
    with Syncs() as syncs:
        norm, found_inf = clip_gradients(model.parameters(), 1.0)
    assert syncs.count == 0
    assert found_inf.item() == 1 and not torch.isfinite(norm)
    step_if_finite(optimizer, found_inf)
    after = snapshot(model, optimizer)
    assert len(after) == len(before) > 3
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    for parameter, gradient in zip(model.parameters(), good, strict=True):
        parameter.grad = gradient
    step_if_finite(optimizer, clip_gradients(model.parameters(), 1.0)[1])
    assert all(torch.isfinite(each).all() for each in snapshot(model, optimizer))
    assert not torch.equal(model[0].weight, before[0]), "the next finite step is taken"
    assert not hasattr(optimizer, "found_inf")


def test_what_cannot_be_is_said(model):
    with pytest.raises(ConfigError, match="SGD cannot skip"):
        step_if_finite(torch.optim.SGD(model.parameters(), lr=1), torch.tensor(0.0))
    model.zero_grad()
    with pytest.raises(ConfigError, match="no parameter has a gradient"):
        clip_gradients(model.parameters(), 1.0)
