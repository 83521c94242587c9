"""Self-attention over packed qkv against softmax(q·kᵀ/√K)·v in float64, by both ways to read."""

from __future__ import annotations

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_rt.kernels import attention as op
from pixart_rt.kernels import attention_backward, launch
from pixart_rt.kernels import attention_choice as choice
from pixart_rt.kernels.attention_backward import attention_backward_triton
from pixart_rt.kernels.attention_tiles import HEAD, SM120
from pixart_rt.kernels.launch import SM80, SM90

# One token; less than a tile; two tiles of keys and a rest, distinct images, two heads.
SHAPES = [(1, 1, 1), (2, 37, 1), (3, 70, 2)]
# Triton's interpreter multiplies the bit patterns of bf16, so products in it need a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32}  # so that a few tokens are several tiles
# Beyond rounding the output: weights are rounded before the second product, in the backward their
# gradients as well, and a rounded score's error grows with the score.
FACTOR = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 1.5}


def packed(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """qkv with scores of some size, and an outlier channel in q and in k."""
    random = torch.Generator().manual_seed(seed)
    B, N, H = shape
    qkv = torch.randn(B, N, 3, H, HEAD, generator=random, dtype=torch.float64)
    qkv[:, :, 0, :, 5] *= 8
    qkv[:, :, 1, :, 70] *= 8  # the narrow part of a head
    return qkv


def exact(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) spelled out."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(qkv.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def descriptors_work(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(shape, dtype, descriptors, device, error, tolerance):
    if descriptors and not descriptors_work(device):
        pytest.skip("descriptors need compute capability 9.0")
    qkv = packed(shape).to(dtype)
    tuned = SMALL | {"DESCRIPTORS": descriptors}
    out, lse = op.attention_triton(qkv.to(device), tuned)
    assert out.dtype == dtype
    expected, expected_lse = exact(qkv.double())
    assert error(out, expected) < FACTOR[dtype] * tolerance[dtype]
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(shape, dtype, descriptors, device, error, tolerance):
    if descriptors and not descriptors_work(device):
        pytest.skip("descriptors need compute capability 9.0")
    qkv = packed(shape, seed=1).to(dtype)
    wide = qkv.double().requires_grad_()
    reference = exact(wide)[0]
    dout = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (expected,) = torch.autograd.grad(reference, wide, dout.double())
    tuned = SMALL | {"DESCRIPTORS": descriptors}
    out, lse = op.attention_triton(qkv.to(device), tuned)
    gradients = [
        attention_backward_triton(dout.to(device), qkv.to(device), out, lse, tuned)
        for _ in range(2)
    ]
    assert gradients[0].dtype == dtype
    if shape[1] == 1:  # one weight, always 1: nothing reaches q and k
        assert error(gradients[0][:, :, 2], expected[:, :, 2]) < tolerance[dtype]
        assert gradients[0][:, :, :2].abs().max() < 10 * tolerance[dtype]
    else:
        for part in range(3):
            bound = 2 * FACTOR[dtype] * tolerance[dtype]
            assert error(gradients[0][:, :, part], expected[:, :, part]) < bound
    assert torch.equal(*gradients)  # no atomics


def test_the_operator_and_its_gradient_with_the_shipped_configuration(device, error, tolerance):
    qkv = packed((2, 150, 1)).half()
    leaf = qkv.to(device).requires_grad_()
    out = op.attention_qkv_packed(leaf)
    wide = qkv.double().requires_grad_()
    expected = exact(wide)[0]
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).half()
    (actual,) = torch.autograd.grad(out, leaf, dout.to(device))
    assert error(out.detach(), expected.detach()) < tolerance[torch.float16]
    (gradient,) = torch.autograd.grad(expected, wide, dout.double())
    assert error(actual, gradient) < 2 * tolerance[torch.float16]


def test_images_and_heads_do_not_mix(device):
    """Spare lanes and rows past an image are another's; large ones there must change nothing."""
    qkv = packed((2, 37, 2)).half().to(device)
    first, _ = op.attention_triton(qkv, SMALL)
    qkv[:, :, :, 1] = 1000.0
    qkv[1] = -1000.0
    second, _ = op.attention_triton(qkv, SMALL)
    assert torch.equal(first[0, :, :HEAD], second[0, :, :HEAD])


@pytest.mark.parametrize("descriptors", [0, 1])
def test_nothing_past_the_tensor_is_used(descriptors, device):
    """The last head's spare lanes lie past the end; an unaligned size leaves rows there, too."""
    if descriptors and not descriptors_work(device):
        pytest.skip("descriptors need compute capability 9.0")
    qkv = packed((2, 37, 2)).half()
    memory = torch.full((qkv.numel() + 2**16,), torch.nan, dtype=torch.half, device=device)
    inner = memory[2**15 :][: qkv.numel()].view(qkv.shape)
    inner.copy_(qkv)
    tuned = SMALL | {"DESCRIPTORS": descriptors}
    out, lse = op.attention_triton(inner, tuned)
    assert out.isfinite().all()
    memory = torch.full((qkv.numel() + 2**16,), torch.nan, dtype=torch.half, device=device)
    dout = memory[2**15 :][: out.numel()].view(out.shape)
    dout.copy_(out)
    assert attention_backward_triton(dout, inner, out, lse, tuned).isfinite().all()


def test_the_formulas_without_a_kernel():
    """What runs where no kernel does, against autograd in float64; no image fits one chunk."""
    qkv = packed((2, attention_backward.REF_QUERIES + 5, 1)).requires_grad_()
    out, lse = exact(qkv)
    torch.testing.assert_close(op.attention_qkv_packed_ref(qkv), out)
    torch.testing.assert_close(attention_backward.lse_ref(*qkv.permute(2, 0, 3, 1, 4)[:2]), lse)
    dout = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, qkv, dout)
    actual = attention_backward.attention_qkv_packed_backward_ref(dout, qkv, out, lse)
    torch.testing.assert_close(actual, expected)


def test_another_head_width_runs_the_reference(device):
    qkv = torch.randn(2, 5, 3, 2, 40, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(op.attention_qkv_packed(qkv), exact(qkv)[0])
    out, lse = op.attention_qkv_packed_op(qkv)
    torch.testing.assert_close(lse, exact(qkv)[1])
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact(qkv)[0].sum(), qkv)[0])


def test_the_mask_of_the_plain_attention():
    q, k, v = torch.randn(3, 2, 1, 7, 8, dtype=torch.float64)
    key_mask = torch.arange(7) < torch.tensor([[3], [7]])
    out = op.attention_ref(q, k, v, key_mask)
    torch.testing.assert_close(out[:1], op.attention_ref(q[:1], k[:1, :, :3], v[:1, :, :3]))
    torch.testing.assert_close(out[1:], op.attention_ref(q[1:], k[1:], v[1:]))


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
def test_other_heads_of_a_buffer_do_not_leak(filler, descriptors, device, error, tolerance):
    """Spare lanes of a head are its neighbour's first ones; not finite, times 0 they would tell."""
    if descriptors and not descriptors_work(device):
        pytest.skip("descriptors need compute capability 9.0")
    qkv = packed((2, 70, 1)).half()
    heads = (1, 3, 5)  # between heads of something else
    buffer = torch.full((2, 70, 7, HEAD), filler, dtype=torch.half)
    for part, head in enumerate(heads):
        buffer[:, :, head] = qkv[:, :, part, 0]
    buffer = buffer.to(device)
    tuned = SMALL | {"DESCRIPTORS": descriptors}
    out, lse = op.attend("attention", buffer, buffer, heads, 1, None, tuned)
    expected, gradients = reference_with_gradients(qkv, dout=out)
    assert error(out, expected) < tolerance[torch.float16]
    made = torch.empty_like(qkv, device=device)
    saved = (buffer, buffer, out, lse)
    attention_backward.backward("attention", out, saved, heads, made.unbind(2), None, tuned)
    for part in range(3):
        assert error(made[:, :, part], gradients[:, :, part]) < 2 * tolerance[torch.float16]


def reference_with_gradients(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    wide = qkv.double().requires_grad_()
    out = exact(wide)[0]
    (gradients,) = torch.autograd.grad(out, wide, dout.cpu().double())
    return out.detach(), gradients


def recorded_launches(qkv: Tensor, target: tuple[int, int]) -> list[launch.Launch]:
    with launch.record(target) as recorded:
        out, lse = op.attention_triton(qkv)
        attention_backward_triton(out, qkv, out, lse)
    return recorded


@pytest.mark.parametrize(
    "target, tables", [((8, 6), SM80), ((9, 0), SM90), ((10, 0), SM90), ((12, 1), SM120)]
)
def test_each_gpu_takes_the_configuration_of_its_family(target, tables):
    with launch.record(target) as recorded:
        op.compile_example(torch.half)
    forward, _, backward_kv, backward_q = recorded
    for each, table in (
        (forward, op.FORWARD),
        (backward_kv, attention_backward.BACKWARD_KV),
        (backward_q, attention_backward.BACKWARD_Q),
    ):
        expected = dict(table[tables])
        assert bool(expected.pop("DESCRIPTORS")) is isinstance(each.args[0], TensorDescriptor)
        assert expected.items() <= each.kwargs.items()
    kv = attention_backward.BACKWARD_KV.values()
    assert all(attention_backward.SPLIT % entry["BLOCK_M"] == 0 for entry in kv)


def test_descriptors_are_not_made_where_they_cannot_be():
    qkv = torch.zeros(2 * 3 * 40 * 72 + 1, dtype=torch.half)[1:].view(2, 40, 3, 1, HEAD)
    for each in recorded_launches(qkv, (9, 0)):  # the address is no multiple of 16 bytes
        assert not any(isinstance(arg, TensorDescriptor) for arg in each.args)
    with launch.record((8, 0)) as recorded:
        op.attention_triton(qkv.clone(), {"DESCRIPTORS": 1})
    assert not any(isinstance(arg, TensorDescriptor) for arg in recorded[0].args)


@pytest.mark.parametrize("name", ["attention_qkv_packed", "attention_qkv_packed_backward"])
def test_registration(name, device):
    qkv = packed((2, 5, 2)).float().to(device)
    if name == "attention_qkv_packed":
        arguments = (qkv.requires_grad_(),)
    else:
        out, lse = op.attention_qkv_packed_op(qkv)
        arguments = (out.clone(), qkv, out, lse)
    torch.library.opcheck(getattr(torch.ops.pixart_rt, name).default, arguments)


def graphs_of(function, *inputs) -> list[str]:
    """The functions that a compiled graph calls, forward and, through autograd, backward."""
    called: list[str] = []

    def count(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if "call" in node.op)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    out = compiled(*inputs)
    if out.requires_grad:
        out.sum().backward()
    return called


def test_a_compiled_graph_without_kernels_is_pytorch_s_attention(no_kernels):
    """No log-sum-exp of ours, which costs a second pass over all scores."""
    qkv = packed((2, 37, 2)).float()
    leaf = qkv.clone().requires_grad_()
    called = graphs_of(op.attention_qkv_packed, leaf)
    assert any("scaled_dot_product" in name and "backward" in name for name in called), called
    assert not any("pixart_rt" in name or "logsumexp" in name for name in called)
    _, expected = reference_with_gradients(qkv, torch.ones(2, 37, 2 * HEAD))
    torch.testing.assert_close(leaf.grad.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter takes float32")
def test_a_compiled_graph_with_kernels_has_the_operators():
    qkv = packed((1, 5, 1)).float()
    called = graphs_of(op.attention_qkv_packed, qkv)
    assert called == ["pixart_rt.attention_qkv_packed_forward.default"]
    called = graphs_of(op.attention_qkv_packed, qkv.requires_grad_())
    assert "pixart_rt.attention_qkv_packed.default" in called
    assert "pixart_rt.attention_qkv_packed_backward.default" in called


def test_a_compiled_graph_serves_every_number_of_tokens():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(op.attention_qkv_packed, backend=count, fullgraph=True, dynamic=True)
    for N in (5, 9, 16):
        qkv = packed((2, N, 1)).float()
        out = compiled(qkv).double()
        torch.testing.assert_close(out, exact(qkv.double())[0], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_a_chosen_implementation_runs_with_its_gradient(device, monkeypatch):
    qkv = packed((2, 37, 2)).to(device, torch.float32)
    called = []
    plain = choice.F.scaled_dot_product_attention
    monkeypatch.setattr(
        choice.F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or plain(*a, **k)
    )
    choice.problem.cache_clear()
    with launch.choosing("attention_qkv_packed", "sdpa"):
        leaf = qkv.clone().requires_grad_()
        out = op.attention_qkv_packed(leaf)
        assert len(called) == 2  # once to find whether it runs
        out.sum().backward()
        again = op.attention_qkv_packed_forward(qkv)
        assert len(called) == 3
    expected, gradient = reference_with_gradients(qkv.cpu(), torch.ones(2, 37, 2 * HEAD))
    torch.testing.assert_close(out.detach().cpu().double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, again)
    torch.testing.assert_close(leaf.grad.cpu().double(), gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="some run on a GPU")
@pytest.mark.parametrize("name", ["cudnn", "fa3", "fa4", "cuddn"])
def test_an_implementation_that_cannot_run_says_so_once_and_ours_does(name, monkeypatch):
    qkv = packed((1, 5, 1)).float()
    choice.problem.cache_clear()
    with launch.choosing("attention_qkv_packed", name), pytest.raises(launch.Unavailable):
        op.attention_qkv_packed(qkv)
    monkeypatch.setattr(launch, "_told", set())
    monkeypatch.setattr(choice, "choice", lambda *_: name)  # as a table names it on a GPU
    with pytest.warns(RuntimeWarning, match=f"names {name} for attention_qkv_packed, which is not"):
        out = op.attention_qkv_packed(qkv)
    assert torch.equal(out, op.attention_qkv_packed(qkv))  # a second warning is an error here
    torch.testing.assert_close(out.double(), exact(qkv.double())[0], atol=1e-5, rtol=1e-5)
    assert choice.current_flash_attention_impl() is None
