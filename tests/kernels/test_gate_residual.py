"""Gated residual with LayerNorm and modulation against both formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixart_rt.kernels import gate_residual as op

SHAPES = [(1, 1, 72), (3, 37, 1152), (2, 16, 144)]  # smallest; ragged XL/2; aligned
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, gated: bool) -> list[Tensor | None]:
    """x, branch, the gate's table and vectors, the norm's; each block and image its own."""
    random = torch.Generator().manual_seed(0)
    B, N, D = shape
    x, branch = torch.randn(2, B, N, D, generator=random).to(dtype).unbind()
    x[..., 5] *= 30
    gate_table, table = torch.randn(2, 6, D, generator=random).to(dtype).unbind()
    gate_shared, shared = torch.randn(2, B, 6, D, generator=random).unbind()
    gate = [gate_table, gate_shared] if gated else [None, None]
    return [x, branch, *gate, table, shared]


def call(function, tensors, *extra):
    x, branch, gate_table, gate_shared, table, shared = tensors
    return function(x, branch, gate_table, gate_shared, 5, table, shared, 3, *extra)


def moved(tensors, function):
    return [None if each is None else function(each) for each in tensors]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(shape, dtype, gated, device, error, tolerance):
    tensors = inputs(shape, dtype, gated)
    out, y = call(op.gate_residual_ln_modulate, moved(tensors, lambda t: t.to(device)))
    wide = moved(tensors, torch.Tensor.double)
    expected_out, expected_y = call(op.gate_residual_ln_modulate_ref, wide)
    assert out.dtype == y.dtype == dtype
    assert error(out, expected_out) < tolerance[dtype]
    assert error(y, expected_y) < 2 * tolerance[dtype]  # of x' as it is stored


def test_lossless_repeats_the_roundings_of_the_unfused_model(device):
    # Triton's interpreter truncates to bf16, where a GPU rounds.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = inputs((3, 37, 1152), dtype, True)
    tensors = [each.to(dtype).to(each.dtype) for each in tensors]
    actual = call(op.gate_residual_ln_modulate, moved(tensors, lambda t: t.to(device)), True)
    expected = call(op.gate_residual_ln_modulate_ref, tensors, True)
    assert torch.equal(actual[0].cpu(), expected[0])
    assert (actual[1].cpu() == expected[1]).float().mean() > 0.995  # sums in another order


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(shape, dtype, gated, device, error, tolerance):
    tensors = inputs(shape, dtype, gated)
    leaves = moved(tensors, lambda t: t.to(device).requires_grad_())
    present = [each for each in leaves if each is not None]
    outputs = call(op.gate_residual_ln_modulate, leaves)
    random = torch.Generator().manual_seed(3)
    seeds = [torch.randn(shape, generator=random).to(dtype) for _ in outputs]
    actual = torch.autograd.grad(outputs, present, [seed.to(device) for seed in seeds])
    wide = moved(tensors, lambda t: t.double().requires_grad_())
    expected = torch.autograd.grad(
        call(op.gate_residual_ln_modulate_ref, wide),
        [each for each in wide if each is not None],
        [seed.double() for seed in seeds],
    )
    for gradient, exact, leaf in zip(actual, expected, present, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, exact) < 3 * tolerance[dtype]


@pytest.mark.parametrize("gated", [True, False])
def test_the_backward_formula_without_a_kernel(gated):
    """What runs where no kernel does, against autograd of the reference in float64."""
    tensors = moved(inputs((3, 7, 24), torch.float32, gated), lambda t: t.double().requires_grad_())
    out, y = call(op.gate_residual_ln_modulate_ref, tensors)
    dout, dy = torch.randn(2, *out.shape, dtype=torch.float64).unbind()
    x, branch, gate_table, gate_shared, table, shared = tensors
    dx, dbranch, dgate, dshared = op.gate_residual_ln_modulate_backward_ref(
        dout, dy, out, branch, op.row_stats(out), gate_table, gate_shared, 5, table, shared, 3,
    )  # fmt: skip
    wanted = (x, branch, shared) if gate_shared is None else (x, branch, shared, gate_shared)
    expected = torch.autograd.grad((out, y), wanted, (dout, dy))
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(dbranch if gated else dx, expected[1])
    torch.testing.assert_close(dshared, expected[2])
    if gated:
        torch.testing.assert_close(dgate[:, 0], expected[3][:, 5])


@pytest.mark.parametrize("gated", [True, False])
def test_registration(gated, device):
    tensors = moved(inputs((2, 5, 72), torch.float32, gated), lambda t: t.to(device))
    x, branch, *_ = tensors
    stats = torch.randn(2, 5, 2, device=device)
    backward = torch.ops.pixart_rt.gate_residual_ln_modulate_backward.default
    x2, _, gate_table, gate_shared, table, shared = moved(tensors, torch.clone)
    torch.library.opcheck(
        backward,
        (x, branch, x2, branch.clone(), stats, gate_table, gate_shared, 5, table, shared, 3),
    )
    moved(tensors, lambda t: t.requires_grad_())
    forward = torch.ops.pixart_rt.gate_residual_ln_modulate.default
    torch.library.opcheck(forward, call(lambda *a: a, tensors, False, None, True))


def autocast(tensors):
    """The tensors as under autocast: the branch in bfloat16, all else float32."""
    x, branch, *others = tensors
    return [x, branch.bfloat16(), *others]


@pytest.mark.parametrize("gated", [True, False])
def test_a_branch_of_another_dtype(gated, device, error, tolerance):
    tensors = autocast(inputs((2, 5, 144), torch.float32, gated))
    leaves = moved(tensors, lambda t: t.to(device).requires_grad_())
    outputs = call(op.gate_residual_ln_modulate, leaves, False, torch.bfloat16)
    assert [each.dtype for each in outputs] == [torch.float32, torch.bfloat16]
    wide = moved(tensors, lambda t: t.double().requires_grad_())
    exact = call(op.gate_residual_ln_modulate_ref, wide)
    assert error(outputs[0], exact[0]) < tolerance[torch.float32]
    assert error(outputs[1], exact[1]) < tolerance[torch.bfloat16]
    random = torch.Generator().manual_seed(3)
    seeds = [torch.randn(each.shape, generator=random).to(each.dtype) for each in outputs]
    present = [each for each in leaves if each is not None]
    actual = torch.autograd.grad(outputs, present, [seed.to(device) for seed in seeds])
    oracles = torch.autograd.grad(
        exact, [each for each in wide if each is not None], [seed.double() for seed in seeds]
    )
    for gradient, oracle, leaf in zip(actual, oracles, present, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, oracle) < 3 * tolerance[leaf.dtype]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 72), (2, 37, 200)])  # columns end inside a tile
@pytest.mark.parametrize("dtype", [*DTYPES, "autocast"])
def test_gate_residual_alone(shape, dtype, gated, device, error, tolerance):
    mixed = dtype == "autocast"
    tensors = inputs(shape, torch.float32 if mixed else dtype, gated)[:4]
    tensors = autocast(tensors) if mixed else tensors
    leaves = moved(tensors, lambda t: t.to(device).requires_grad_())
    out = op.gate_residual(*leaves, 5)
    wide = moved(tensors, lambda t: t.double().requires_grad_())
    exact = op.gate_residual_ref(*wide, 5)
    assert out.dtype == leaves[0].dtype
    assert error(out, exact) < tolerance[out.dtype]
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    present = [each for each in leaves if each is not None]
    actual = torch.autograd.grad(out, present, dout.to(device))
    oracles = torch.autograd.grad(exact, [t for t in wide if t is not None], dout.double())
    for gradient, oracle, leaf in zip(actual, oracles, present, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, oracle) < 2 * tolerance[leaf.dtype]


def test_gate_residual_alone_lossless(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # see above
    tensors = inputs((2, 5, 144), dtype, True)[:4]
    actual = op.gate_residual(*moved(tensors, lambda t: t.to(device)), 5, True)
    expected = op.gate_residual_ref(*tensors, 5, True)
    assert torch.equal(actual.cpu(), expected)
    assert not torch.equal(op.gate_residual_ref(*tensors, 5), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_the_backward_formula_of_gate_residual_alone(gated):
    """What runs where no kernel does, against autograd of the reference in float64."""
    tensors = moved(inputs((3, 7, 24), torch.float32, gated), lambda t: t.double().requires_grad_())
    x, branch, gate_table, gate_shared, *_ = tensors
    dout = torch.randn(x.shape, dtype=torch.float64)
    out = op.gate_residual_ref(x, branch, gate_table, gate_shared, 5)
    if not gated:
        assert torch.equal(torch.autograd.grad(out, branch, dout)[0], dout)
        return
    expected = torch.autograd.grad(out, (branch, gate_shared), dout)
    dbranch, dgate = op.gate_residual_backward_ref(dout, branch, gate_table, gate_shared, 5)
    torch.testing.assert_close(dbranch, expected[0])
    torch.testing.assert_close(dgate[:, 0], expected[1][:, 5])


@pytest.mark.parametrize("gated", [True, False])
def test_registration_of_mixed_dtypes(gated, device):
    tensors = moved(autocast(inputs((2, 5, 72), torch.float32, gated)), lambda t: t.to(device))
    x, branch, gate_table, gate_shared, *_ = moved(tensors, torch.clone)
    ours = torch.ops.pixart_rt
    if gated:
        torch.library.opcheck(
            ours.gate_residual_backward.default, (x, branch, gate_table, gate_shared, 5)
        )
    moved(tensors, lambda t: t.requires_grad_())
    torch.library.opcheck(ours.gate_residual.default, (*tensors[:4], 5, False))
    extra = False, torch.bfloat16, True
    forward = ours.gate_residual_ln_modulate.default
    torch.library.opcheck(forward, call(lambda *a: a, tensors, *extra))
