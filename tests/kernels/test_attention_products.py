"""Attention by matrix products, and its gradients, against softmax(q·kᵀ/√K + mask)·v in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pixart_rt.kernels import attention_products as op
from pixart_rt.model import operators

# B, H, N, T: one query and one key; odd numbers; several images and heads; text.
SHAPES = [(1, 1, 1, 1), (2, 3, 37, 37), (3, 2, 70, 70), (3, 2, 65, 11)]
TOLERANCE = 8e-3  # rounding of inputs, scores, weights and outputs, in the Frobenius norm


def inputs(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, ...]:
    """q, k, v with an outlier channel, a mask that sees one key or more, the output's gradient."""
    B, H, N, T = shape
    random = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(B, H, N, 72, generator=random, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(B, H, T, 72, generator=random, dtype=torch.float64) for _ in range(2))
    q[..., 5] *= 8
    k[..., 70] *= 8
    mask = torch.rand(B, T, generator=random) < 0.5
    mask[:, T // 2] = True
    return q, k, v, mask, g


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return scores.softmax(-1) @ v


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, g: Tensor):
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    out = attend(*leaves, mask)
    return (out, *torch.autograd.grad(out, leaves, g))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scores", [1, 400, op.SCORES])  # a query at a time; ragged parts; at once
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_exact(shape, scores, masked, monkeypatch):
    monkeypatch.setattr(op, "SCORES", scores)
    q, k, v, mask, g = inputs(shape, seed=sum(shape))
    arguments = (q, k, v, mask if masked else None, g)
    found = with_gradients(op.attention_products, *arguments)
    for each, expected in zip(found, with_gradients(exact, *arguments), strict=True):
        torch.testing.assert_close(each, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scores", [2000, op.SCORES])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_right_up_to_rounding(shape, scores, masked, monkeypatch):
    monkeypatch.setattr(op, "SCORES", scores)
    q, k, v, mask, g = (
        each.bfloat16() if each.is_floating_point() else each for each in inputs(shape, seed=7)
    )
    arguments = (q, k, v, mask if masked else None, g)
    wide = tuple(x.double() if x is not None and x.is_floating_point() else x for x in arguments)
    found = with_gradients(op.attention_products, *arguments)
    for each, expected in zip(found, with_gradients(exact, *wide), strict=True):
        assert each.dtype == torch.bfloat16
        difference = (each.detach().double() - expected.detach()).norm()
        assert difference < TOLERANCE * max(float(expected.detach().norm()), 1.0)  # one key: 0


def test_the_model_trains_by_it_and_samples_without(monkeypatch):
    called = []

    def noted(*arguments: Tensor) -> Tensor:
        called.append(arguments)
        return op.attention_products(*arguments)

    monkeypatch.setattr(operators, "attention_products", noted)
    q, k, v, mask, _ = inputs((2, 3, 9, 9), seed=1)
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).requires_grad_()  # [B, N, 3, H, K]
    rows = q.transpose(1, 2).bfloat16().requires_grad_()
    kv = torch.stack([k, v]).permute(1, 3, 0, 2, 4).bfloat16().requires_grad_()
    model = operators.Operators()
    expected = exact(q, k, v, None).transpose(1, 2).flatten(2)
    expected_masked = exact(q, k, v, mask).transpose(1, 2).flatten(2)
    with torch.no_grad():
        model.self_attention(qkv.bfloat16())
        model.cross_attention(rows, kv, mask)
    model.self_attention(qkv.float())
    assert not called
    outs = model.self_attention(qkv.bfloat16()), model.cross_attention(rows, kv, mask)
    assert len(called) == 2
    for out, wide in zip(outs, (expected, expected_masked), strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.detach().double() - wide).norm() < 1.5 * TOLERANCE * wide.norm()


def test_a_compiler_takes_pytorchs():
    x = torch.randn(1, 1, 4, 72, dtype=torch.bfloat16, requires_grad=True)
    asked = torch.compile(lambda x: x + op.trains_by_products(x), backend="eager", fullgraph=True)
    assert op.trains_by_products(x)
    torch.testing.assert_close(asked(x), x, atol=0, rtol=0)  # False is added
