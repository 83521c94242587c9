"""Linears with gate and residual or GELU against their formulas in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_rt.kernels import linear as op

SHAPES = [(1, 1, 72, 40), (3, 37, 144, 200), (1, 37, 1152, 1152)]  # B, N, I, O
DTYPES = [torch.float32, torch.float16]
LOOSE = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def dtypes(device):
    """Triton's interpreter multiplies bfloat16 wrongly; a GPU is tested with it too."""
    return [*DTYPES, torch.bfloat16] if device.type == "cuda" else DTYPES


def inputs(shape, dtype, gated=True):
    """x, weight, bias, table, shared, residual; an outlier channel, every image its own gate."""
    random = torch.Generator().manual_seed(0)
    B, N, I, O = shape
    x = torch.randn(B, N, I, generator=random)
    x[..., 5] *= 30
    half = [x, torch.randn(O, I, generator=random) / I**0.5, torch.randn(O, generator=random)]
    table, shared = torch.randn(6, O, generator=random), torch.randn(B, 6, O, generator=random)
    residual = torch.randn(B, N, O, generator=random).to(dtype)
    half = [each.to(dtype) for each in half]
    return [*half, table.to(dtype), shared, residual] if gated else [*half, residual]


def gated(function, tensors, *extra):
    x, weight, bias, table, shared, residual = tensors
    return function(x, weight, bias, table, shared, 5, residual, *extra)


def plain(function, tensors, *extra):
    return function(*tensors, *extra)


def residual_ref(x, weight, bias, residual):
    return op.linear_gate_residual_ref(x, weight, bias, None, None, 0, residual)


CASES = {  # name -> how to call, ours, reference, how many of the inputs it takes
    "gate": (gated, op.linear_gate_residual, op.linear_gate_residual_ref),
    "residual": (plain, op.linear_residual, residual_ref),
    "gelu": (plain, op.linear_gelu, op.linear_gelu_ref),
}


def tensors_of(name, shape, dtype):
    tensors = inputs(shape, dtype, gated=name == "gate")
    return tensors[:3] if name == "gelu" else tensors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(name, shape, dtypes, device, error):
    call, ours, reference = CASES[name]
    for dtype in dtypes:
        tensors = tensors_of(name, shape, dtype)
        actual = call(ours, [each.to(device) for each in tensors])
        expected = call(reference, [each.double() for each in tensors])
        assert actual.dtype == dtype
        assert error(actual, expected) < LOOSE[dtype]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_backward(name, shape, dtypes, device, error):
    call, ours, reference = CASES[name]
    for dtype in dtypes:
        tensors = tensors_of(name, shape, dtype)
        leaves = [each.to(device).requires_grad_() for each in tensors]
        random = torch.Generator().manual_seed(3)
        out = call(ours, leaves)
        dout = torch.randn(out.shape, generator=random).to(dtype)
        actual = torch.autograd.grad(out, leaves, dout.to(device))
        wide = [each.double().requires_grad_() for each in tensors]
        expected = torch.autograd.grad(call(reference, wide), wide, dout.double())
        for gradient, exact, leaf in zip(actual, expected, leaves, strict=True):
            assert gradient.dtype == leaf.dtype
            assert error(gradient, exact) < 2 * LOOSE[dtype]
        again = torch.autograd.grad(call(ours, leaves), leaves, dout.to(device))
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))  # no atomics


@pytest.mark.parametrize("name", ["gate", "residual"])
def test_a_wider_residual(name, device, error):
    """Autocast: x, weight and bias have 16 bits, residual, out and the gate 32."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    call, ours, reference = CASES[name]
    tensors = tensors_of(name, (3, 37, 144, 200), torch.float32)
    tensors[:3] = [each.to(half) for each in tensors[:3]]
    leaves = [each.to(device).requires_grad_() for each in tensors]
    out = call(ours, leaves)
    assert out.dtype == torch.float32
    wide = [each.double().requires_grad_() for each in tensors]
    expected = call(reference, wide)
    assert error(out.detach(), expected.detach()) < LOOSE[torch.float32]  # no rounding to 16 bits
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    actual = torch.autograd.grad(out, leaves, dout.to(device))
    exact = torch.autograd.grad(expected, wide, dout.double())
    for gradient, right, leaf in zip(actual, exact, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, right) < 2 * LOOSE[half]


def test_inference_calls_the_launcher_and_training_the_operator(device, monkeypatch):
    calls = []
    for name in ("linear_gate_residual_op", "linear_gelu_op"):
        inner = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, inner=inner: calls.append(inner) or inner(*a))
    for name, (call, ours, _) in CASES.items():
        tensors = [each.to(device) for each in tensors_of(name, (2, 5, 72, 40), torch.float32)]
        leaves = [each.clone().requires_grad_() for each in tensors]
        with torch.no_grad():
            direct = call(ours, leaves)
        assert torch.equal(direct, call(ours, tensors))
        assert not calls
        assert torch.equal(direct, call(ours, leaves).detach()) and len(calls) == 1
        calls.clear()


def test_descriptors_are_those_that_triton_makes():
    """Made without its checks, and so without its constructor."""
    matrix = torch.empty(3, 37, 144, dtype=torch.float16)
    ours = vars(op._descriptor(matrix, 3 * 37, 144, [64, 32]))
    theirs = vars(TensorDescriptor(matrix.view(-1, 144), [3 * 37, 144], [144, 1], [64, 32]))
    assert ours.pop("base") is matrix
    assert theirs.pop("base").data_ptr() == matrix.data_ptr()
    assert ours == theirs


SAME_CODE = """
import torch
from pixart_rt.kernels import fp8_linear, launch, linear
from pixart_rt.kernels.codegen import ast_source

def compiled(tokens):
    with torch.device("meta"), launch.record((9, 0)) as launches:
        for file in (linear, fp8_linear):
            file.compile_example(torch.bfloat16, 2, tokens)
    sources = [ast_source(each)[0] for each in launches]
    assert all(len(each.kernel.params) <= 16 for each in launches)
    return {(s.fn.__name__, str(s.signature), str(s.constants), str(s.attrs)) for s in sources}

assert len(compiled(1024)) > 15
assert compiled(1012) == compiled(1024)  # 22x46 tokens, in no kernel's way
linear._linear_kernel.params[5].__dict__["do_not_specialize"] = False
assert compiled(1012) != compiled(1024)
"""


def test_a_number_of_tokens_compiles_nothing_new():
    """Nor do tensors without data, and no kernel has more than 16 parameters."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_CODE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_image_has_its_own_gate(device, error):
    tensors = inputs((3, 37, 144, 200), torch.float32)
    tensors[0] = tensors[0][:1].expand(3, -1, -1)  # equal images: the gates make the difference
    tensors[5] = tensors[5][:1].expand(3, -1, -1)
    out = gated(op.linear_gate_residual, [each.to(device) for each in tensors]).cpu()
    expected = gated(op.linear_gate_residual_ref, tensors)
    assert error(out, expected) < 5e-6
    assert error(out[1], out[0]) > 0.1


@pytest.mark.parametrize("name", ["gate", "residual"])
def test_lossless_repeats_the_roundings_of_the_unfused_model(name, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    call, ours, _ = CASES[name]
    tensors = tensors_of(name, (3, 37, 144, 200), dtype)
    if name == "gate":
        tensors[4] = tensors[4].to(dtype).float()
    product = torch.nn.functional.linear(*(each.to(device) for each in tensors[:3]))
    if name == "gate":
        product = (tensors[3][5] + tensors[4][:, 5, None].to(dtype)).to(device) * product
    expected = (tensors[-1].to(device) + product).cpu()
    actual = call(ours, [each.to(device) for each in tensors], True).cpu()
    # Another order of summation moves a product across a rounding border now and then.
    assert (actual == expected).float().mean() > 0.98
    exact = call(ours, [each.to(device) for each in tensors], False).cpu()
    assert (exact == expected).float().mean() < (actual == expected).float().mean()


def test_the_backward_formulas_without_a_kernel():
    """What runs where no kernel does, against autograd of the references in float64."""
    random = torch.Generator().manual_seed(0)
    product = torch.randn(3, 7, 24, generator=random, dtype=torch.float64).requires_grad_()
    dy = torch.randn(3, 7, 24, generator=random, dtype=torch.float64)
    table = torch.randn(6, 24, generator=random, dtype=torch.float64)
    shared = torch.randn(3, 6, 24, generator=random, dtype=torch.float64).requires_grad_()
    out = op.gate_residual_ref(torch.zeros_like(product), product, table, shared, 5)
    expected = torch.autograd.grad(out, (product, shared), dy)
    dproduct, sums = op.gate_backward_ref(dy, product, table, shared, 5)
    torch.testing.assert_close(dproduct, expected[0])
    torch.testing.assert_close(sums[:, 0], expected[0].sum(1))
    torch.testing.assert_close(sums[:, 1], expected[1][:, 5])
    wanted = torch.nn.functional.gelu(product, approximate="tanh")
    expected = torch.autograd.grad(wanted, product, dy)
    dproduct, sums = op.gelu_backward_ref(dy, product)
    torch.testing.assert_close(dproduct, expected[0])
    torch.testing.assert_close(sums[:, 0], expected[0].sum(1))


def test_descriptors_and_pointers_agree(device):
    """Both ways to read tiles; an odd width has no descriptors, so the case forces them off."""
    from pixart_rt.kernels import launch

    x, weight, bias, table, shared, residual = (
        each.to(device) for each in inputs((3, 37, 144, 200), torch.float16)
    )
    before = launch.capability
    results = []
    for capability in ((8, 0), (9, 0)):
        if device.type == "cuda" and before(x) < capability:
            pytest.fail("this GPU has no descriptors; run the test elsewhere")
        op.capability = lambda _, capability=capability: capability
        try:
            gate = (table, shared, 5)
            results.append(op.linear_triton(x, weight, bias, gate=gate, residual=residual)[0])
        finally:
            op.capability = before
    assert torch.equal(*results)


def test_takes_views(device):
    """Not contiguous, and contiguous from an address that a descriptor cannot begin at."""
    x, weight, bias, residual = (
        each.to(device) for each in inputs((3, 37, 144, 200), torch.float16, gated=False)
    )
    expected = op.linear_residual(x, weight, bias, residual)
    swapped = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (x, residual)]
    assert torch.equal(op.linear_residual(swapped[0], weight, bias, swapped[1]), expected)
    shifted = []
    for each in (x, weight, residual):
        flat = each.new_empty(each.numel() + 1)
        shifted.append(flat[1:].view(each.shape).copy_(each))
    assert all(each.is_contiguous() and each.data_ptr() % 16 for each in shifted)
    actual = op.linear_residual(shifted[0], shifted[1], bias, shifted[2])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["gate", "residual", "gelu"])
def test_frozen_inputs_cost_no_product(name, device):
    from torch.utils.flop_counter import FlopCounterMode

    call, ours, _ = CASES[name]
    for wanted in range(2):  # x, weight
        tensors = [each.to(device) for each in tensors_of(name, (2, 5, 72, 40), torch.float32)]
        tensors[wanted].requires_grad_()
        out = call(ours, tensors)
        with FlopCounterMode(display=False) as flops:
            out.sum().backward()
        assert flops.get_total_flops() == 2 * (2 * 5) * 72 * 40  # one product, not two


def test_a_refused_kernel_is_refused_in_the_backward_too(device, monkeypatch):
    asked = []
    monkeypatch.setattr(op, "runs_triton", lambda name, *_: bool(asked.append(name)))
    leaves = [each.to(device).requires_grad_() for each in
              tensors_of("gelu", (2, 5, 72, 40), torch.float32)]  # fmt: skip
    op.linear_gelu(*leaves).sum().backward()
    assert asked == ["linear_gelu", "linear_gelu"]


@pytest.mark.parametrize("name", ["gate", "residual", "gelu", "backward gate", "backward gelu"])
def test_registration(name, device):
    x, weight, bias, table, shared, residual = (
        each.to(device) for each in inputs((2, 5, 72, 40), torch.float32)
    )
    ours = torch.ops.pixart_rt
    product = residual.clone()
    operator, arguments = {
        "gate": (ours.linear_gate_residual,
                 (x, weight, bias, table, shared, 5, residual, False, True)),
        "residual": (ours.linear_gate_residual,
                     (x, weight, bias, None, None, 0, residual, False, False)),
        "gelu": (ours.linear_gelu, (x, weight, bias, False, True)),
        "backward gate": (ours.linear_backward, (residual, product, table, shared, 5)),
        "backward gelu": (ours.linear_backward, (residual, product, None, None, 0)),
    }[name]  # fmt: skip
    if "backward" not in name:
        for each in arguments:
            if isinstance(each, torch.Tensor):
                each.requires_grad_()
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole_with_any_number_of_tokens(name, device):
    call, ours, reference = CASES[name]
    compiled = torch.compile(
        lambda tensors: call(ours, tensors), backend="aot_eager", fullgraph=True
    )
    for N in (5, 9):
        tensors = [each.to(device) for each in tensors_of(name, (2, N, 72, 40), torch.float32)]
        for each in (tensors[0], tensors[-1]):
            if each.dim() == 3:
                torch._dynamo.mark_dynamic(each, 1)
        leaves = [each.requires_grad_() for each in tensors]
        out = compiled(leaves)
        torch.testing.assert_close(out, call(reference, leaves), atol=1e-4, rtol=1e-4)
        out.sum().backward()
        assert all(each.grad is not None for each in leaves)
