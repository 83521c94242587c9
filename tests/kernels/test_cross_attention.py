"""Three forms of cross-attention against masked softmax in float64, and against each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels import attention_backward
from pixart_rt.kernels import cross_attention as op
from pixart_rt.kernels.attention_tiles import HEAD

# The interpreter multiplies the bit patterns of bf16, so products in it need a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32}  # so that a few tokens are several tiles
SIZES = [(1, 1, 5, 1), (3, 37, 120, 2), (3, 70, 33, 1)]  # B, N, T, H
FACTOR = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 1.5}  # rounded weights
LENGTHS = [16, 32, 64]


class Layer(NamedTuple):
    """One block's cross-attention between x and the residual, with a prompt's kv."""

    x: Tensor
    kv: Tensor
    key_mask: Tensor
    q_weight: Tensor
    q_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor

    def standard(self) -> Tensor:
        """The whole layer by the standard form in the dtype of its tensors, no kernel."""
        q = F.linear(self.x, self.q_weight, self.q_bias).unflatten(2, self.kv.shape[3:])
        return F.linear(exact(q, self.kv, self.key_mask)[0], self.proj_weight, self.proj_bias)


def exact(q: Tensor, kv: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) spelled out."""
    k, v = kv.permute(2, 0, 3, 1, 4)
    scores = q.transpose(1, 2) @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~key_mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def inputs(size: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q and kv with outlier channels; masks of the last token alone, of half, of all tokens."""
    random = torch.Generator().manual_seed(seed)
    B, N, T, H = size
    q = torch.randn(B, N, H, HEAD, generator=random, dtype=torch.float64)
    kv = torch.randn(B, T, 2, H, HEAD, generator=random, dtype=torch.float64)
    q[..., 5] *= 8
    kv[:, :, 0, :, 70] *= 8
    key_mask = torch.arange(T) < torch.tensor([1, T // 2, T][:B])[:, None]
    if B > 1:
        key_mask[0] = key_mask[0].flip(0)  # whole blocks of keys before it are masked
    return q, kv, key_mask


def layer(heads: int, valid: list[int], num_tokens: int = 37) -> Layer:
    random = torch.Generator().manual_seed(4)
    D, B, T = heads * HEAD, len(valid), 77

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64) * std

    x = normal(B, num_tokens, D) + 0.5
    x[..., 3] *= 20  # an outlier channel
    return Layer(
        x=x,
        kv=normal(B, T, 2, heads, HEAD),
        key_mask=torch.arange(T) < torch.tensor(valid)[:, None],
        q_weight=normal(D, D, std=D**-0.5),
        q_bias=normal(D),
        proj_weight=normal(D, D, std=D**-0.5),
        proj_bias=normal(D),
    )


def skip_without_descriptors(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(size, dtype, descriptors, device, error, tolerance):
    if descriptors:
        skip_without_descriptors(device)
    q, kv, key_mask = inputs(size)
    q, kv = q.to(dtype), kv.to(dtype)
    out, lse = op.cross_attention_triton(
        q.to(device), kv.to(device), key_mask.to(device), SMALL | {"DESCRIPTORS": descriptors}
    )
    assert out.dtype == dtype
    expected, expected_lse = exact(q.double(), kv.double(), key_mask)
    assert error(out, expected) < FACTOR[dtype] * tolerance[dtype]
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-5, rtol=1e-5)


def test_one_visible_token_is_returned_as_it_is(device):
    """Masked weights are 0 and not small: also where masked scores are the largest."""
    q, kv, key_mask = inputs((3, 37, 120, 1))
    q, kv = q.half() * 30, kv.half() * 30
    out, _ = op.cross_attention_triton(q.to(device), kv.to(device), key_mask.to(device), SMALL)
    token = kv[0, -1, 1].flatten()
    assert torch.equal(out[0].cpu(), token.expand(37, -1))


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(size, dtype, descriptors, device, error, tolerance):
    if descriptors:
        skip_without_descriptors(device)
    q, kv, key_mask = inputs(size, seed=1)
    q, kv = q.to(dtype), kv.to(dtype)
    wide = [each.double().requires_grad_() for each in (q, kv)]
    reference = exact(*wide, key_mask)[0]
    dout = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = torch.autograd.grad(reference, wide, dout.double())
    tuned = SMALL | {"DESCRIPTORS": descriptors}
    given = [each.to(device) for each in (q, kv, key_mask)]
    out, lse = op.cross_attention_triton(*given, tuned)
    gradients, again = (
        op.cross_attention_backward_triton(dout.to(device), *given, out, lse, tuned)
        for _ in range(2)
    )
    for actual, exactly in zip(gradients, expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, exactly) < 2 * FACTOR[dtype] * tolerance[dtype]
    assert gradients[1][0, :-1].count_nonzero() == 0  # masked tokens get nothing
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # no atomics


def test_queries_of_several_programs_add_up(device, error, tolerance, monkeypatch):
    """The dK/dV pass divides the queries; here into 3 parts, the last one ragged."""
    monkeypatch.setattr(attention_backward, "SPLIT", 64)
    q, kv, key_mask = inputs((2, 150, 33, 1))
    q, kv = q.half(), kv.half()
    wide = [each.double().requires_grad_() for each in (q, kv)]
    (expected,) = torch.autograd.grad(exact(*wide, key_mask)[0].sum(), wide[1])
    leaves = [each.to(device).requires_grad_() for each in (q, kv)]
    out = op.cross_attention(*leaves, key_mask.to(device))
    (actual,) = torch.autograd.grad(out.sum(), leaves[1])
    assert attention_backward.splits(150) == 3
    assert error(actual, expected) < 2 * tolerance[torch.float16]


def test_the_formulas_without_a_kernel():
    q, kv, key_mask = inputs((3, 7, 12, 2))
    q.requires_grad_(), kv.requires_grad_()
    out, lse = exact(q, kv, key_mask)
    torch.testing.assert_close(op.cross_attention_ref(q, kv, key_mask), out)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, kv), dout)
    actual = op.cross_attention_backward_ref(dout, q, kv, key_mask, out, lse)
    for each, exactly in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, exactly)
    again, sums = op.cross_attention_op(q, kv, key_mask)  # float64: no kernel takes it
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(sums, lse)
    for each, exactly in zip(torch.autograd.grad(again, (q, kv), dout), expected, strict=True):
        torch.testing.assert_close(each, exactly)


def test_the_constant_form_is_the_standard_one():
    made = layer(2, [1, 1, 1])
    made.key_mask[1] = made.key_mask[1].roll(5)  # the visible token need not be the first
    assert op.is_constant(made.key_mask).all()
    assert op.is_constant(layer(1, [1, 2, 77]).key_mask).tolist() == [True, False, False]
    out = op.cross_attention_constant(made.kv, made.key_mask, made.proj_weight, made.proj_bias)
    assert out.shape == (3, 1, 144)
    torch.testing.assert_close(out.expand(-1, 37, -1), made.standard())


@pytest.mark.parametrize("length", LENGTHS)
def test_the_absorbed_form_is_the_standard_one(length):
    made = layer(2, [1, length // 2, length])
    made.key_mask[1] = made.key_mask[1].roll(7)  # visible tokens need not come first
    absorbed = op.absorb(*made[1:], length)
    assert absorbed.keys.shape == absorbed.values.shape == (3, 2 * length, 144)
    out = op.cross_attention_absorbed_ref(made.x, *absorbed)
    torch.testing.assert_close(out, made.standard())


def test_a_prompt_tensor_shorter_than_the_slots():
    made = layer(1, [3, 9])
    made = made._replace(kv=made.kv[:, :10], key_mask=made.key_mask[:, :10])
    absorbed = op.absorb(*made[1:], 16)
    out = op.cross_attention_absorbed_ref(made.x, *absorbed)
    torch.testing.assert_close(out, made.standard())


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_probabilities(length, dtype, descriptors, device, error, tolerance):
    if descriptors:
        skip_without_descriptors(device)
    made = layer(3, [1, length // 2, length], num_tokens=70)  # 3 heads: no multiple of 128 columns
    absorbed = op.absorb(made.kv.to(dtype), *made[2:], length)
    x = made.x.to(dtype)
    given = [each.to(device) for each in (x, absorbed.keys, absorbed.bias)]
    tuned = {"BLOCK_M": 32, "BLOCK_K": 32, "DESCRIPTORS": descriptors}
    p = op.absorbed_scores_triton(*given, tuned)
    scores = (x.double() @ absorbed.keys.double().mT).unflatten(-1, absorbed.bias.shape[1:])
    expected = (scores + absorbed.bias[:, None].double()).softmax(-1)
    # In float32 a score of 50 is known to 4e-6, and so is its exponential, relatively.
    assert error(p, expected.flatten(2)) < max(tolerance[dtype], 1e-5)
    assert (p.unflatten(-1, absorbed.bias.shape[1:])[0, ..., 1:] == 0).all()  # slots without token


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_operator(dtype, device, error, tolerance):
    """Against the standard layer, whose own rounding of q and of the output it does not have."""
    made = layer(2, [1, 17, 32])
    rounded = Layer(*(each if each.dtype == torch.bool else each.to(dtype) for each in made))
    absorbed = op.absorb(*(each.to(device) for each in rounded[1:]), 32)
    out = op.cross_attention_absorbed(rounded.x.to(device), *absorbed)
    assert out.dtype == dtype
    wide = Layer(*(each if each.dtype == torch.bool else each.double() for each in rounded))
    # Keys' rounded once move scores that an outlier channel makes large.
    assert error(out, wide.standard()) < 3 * tolerance[dtype]
    rows = torch.full((5, *out.shape[1:]), 7.0, dtype=dtype, device=device)
    rows[1:4] = rounded.x.to(device)
    op.add_cross_attention_absorbed(rows[1:4], *absorbed)
    assert error(rows[1:4], wide.x + wide.standard()) < 3 * tolerance[dtype]
    assert (rows[::4] == 7).all()  # the rows next to them are another's


def test_too_short_a_length_is_refused():
    made = layer(1, [3, 40])
    with pytest.raises(ValueError, match="at least the 40 visible tokens"):
        op.absorb(*made[1:], 32)


def test_choice_of_the_form():
    counts = {1: 1, 2: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 0, 120: 0}
    assert {count: op.choose_form(count).value for count in counts} == counts


@pytest.mark.parametrize(
    "name",
    [
        "cross_attention",
        "cross_attention_backward",
        "cross_attention_absorbed",
        "add_cross_attention_absorbed",
    ],
)
def test_registration(name, device):
    q, kv, key_mask = inputs((2, 5, 7, 2))
    q, kv, key_mask = q.float().to(device), kv.float().to(device), key_mask.to(device)
    if name == "cross_attention":
        arguments = (q.requires_grad_(), kv.requires_grad_(), key_mask)
    elif name == "cross_attention_backward":
        out, lse = op.cross_attention_op(q, kv, key_mask)
        arguments = (out.clone(), q, kv, key_mask, out, lse)
    else:
        *_, example = op.OPERATORS
        arguments = example.example(device, torch.float32, 0)
    torch.library.opcheck(getattr(torch.ops.pixart_rt, name).default, arguments)


def test_a_compiled_graph_without_kernels_is_pytorch_s_attention(no_kernels):
    q, kv, key_mask = (each.float() if each.is_floating_point() else each
                       for each in inputs((2, 5, 7, 2)))  # fmt: skip
    called: list[str] = []

    def count(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if "call" in node.op)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(op.cross_attention, backend=count, fullgraph=True)(q, kv, key_mask)
    torch.testing.assert_close(out, op.cross_attention_ref(q, kv, key_mask))
    assert any("scaled_dot_product" in name for name in called)
    assert not any("pixart_rt" in name for name in called)
