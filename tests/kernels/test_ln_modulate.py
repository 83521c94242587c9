"""LayerNorm with adaLN-single modulation against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixart_rt.kernels import launch
from pixart_rt.kernels import ln_modulate as op

SHAPES = [(1, 1, 72), (3, 37, 1152), (2, 16, 144)]  # smallest; ragged XL/2; aligned
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x with a mean far from 0 and an outlier channel, a table, and a vector for each image."""
    random = torch.Generator().manual_seed(seed)
    B, N, D = shape
    x = torch.randn(B, N, D, generator=random, dtype=torch.float64) * 2 + 1
    x[..., 5] *= 30
    table = torch.randn(6, D, generator=random, dtype=torch.float64)
    shared = torch.randn(B, 6, D, generator=random, dtype=torch.float64)
    return x, table, shared


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(shape, dtype, device, error, tolerance):
    x, table, shared = inputs(shape)
    x, table, shared = x.to(dtype), table.to(dtype), shared.float()
    y = op.ln_modulate(x.to(device), table.to(device), shared.to(device), 3)
    assert y.dtype == dtype
    expected = op.ln_modulate_ref(x.double(), table.double(), shared.double(), 3)
    assert error(y, expected) < tolerance[dtype]


def test_every_image_has_its_own_modulation(device, error):
    """A published kernel of this kind gives all images the first one's scale."""
    x, table, shared = (each.float() for each in inputs((3, 37, 1152)))
    x = x[:1].expand(3, -1, -1)  # equal images: what differs comes from the modulation
    y = op.ln_modulate(x.to(device), table.to(device), shared.to(device)).cpu()
    for image in range(3):
        alone = op.ln_modulate_ref(x[:1], table, shared[image : image + 1])
        assert error(y[image : image + 1], alone) < 2e-6
    assert error(y[1], y[0]) > 0.1


def test_lossless_repeats_the_roundings_of_the_unfused_model(device):
    # Triton's interpreter truncates to bf16, where a GPU rounds.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x, table, shared = inputs((3, 37, 1152))
    x, table, shared = x.to(dtype), table.to(dtype), shared.to(dtype).float()
    y = op.ln_modulate(x.to(device), table.to(device), shared.to(device), 0, True).cpu()
    expected = op.ln_modulate_ref(x, table, shared, 0, True)
    # Sums over a row in another order move a value across a rounding border now and then.
    assert (y == expected).float().mean() > 0.995
    exact = op.ln_modulate(x.to(device), table.to(device), shared.to(device), 0, False).cpu()
    assert (exact == expected).float().mean() < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, device, error, tolerance):
    x, table, shared = inputs(shape, seed=1)
    x, table, shared = x.to(dtype), table.to(dtype), shared.float()
    leaves = [each.to(device).requires_grad_() for each in (x, table, shared)]
    y = op.ln_modulate(*leaves, 3)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dy = dy.to(dtype)
    gradients = torch.autograd.grad(y, leaves, dy.to(device))
    wide = [each.double().requires_grad_() for each in (x, table, shared)]
    expected = torch.autograd.grad(op.ln_modulate_ref(*wide, 3), wide, dy.double())
    for actual, exact, leaf in zip(gradients, expected, leaves, strict=True):
        assert actual.dtype == leaf.dtype
        assert error(actual, exact) < 2 * tolerance[dtype]
    again = torch.autograd.grad(op.ln_modulate(*leaves, 3), leaves, dy.to(device))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # no atomics


def test_the_backward_formula_without_a_kernel():
    """What runs where no kernel does, against autograd of the reference in float64."""
    x, table, shared = (each.requires_grad_() for each in inputs((3, 7, 24)))
    dy = torch.randn_like(x)
    dx, dshared = op.ln_modulate_backward_ref(dy, x, op.row_stats(x), table, shared, 3)
    expected = torch.autograd.grad(op.ln_modulate_ref(x, table, shared, 3), (x, shared), dy)
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(dshared, expected[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8(shape, device, error):
    x, table, shared = inputs(shape)
    x, table, shared = x.half(), table.half(), shared.float()
    y, scale = op.ln_modulate_fp8(x.to(device), table.to(device), shared.to(device), 3)
    expected = op.ln_modulate_ref(x.double(), table.double(), shared.double(), 3)
    assert y.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(
        scale.cpu().double(), expected.abs().amax(-1) / op.E4M3_MAX, rtol=1e-5, atol=0
    )
    assert y.float().abs().amax() == op.E4M3_MAX
    # e4m3 keeps 3 bits: half a step when rounded, a whole one in the interpreter, which truncates.
    assert error(y.float() * scale[..., None], expected) < (0.04 if y.is_cuda else 0.09)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["ln_modulate", "ln_modulate_backward", "ln_modulate_fp8"])
def test_registration(name, out_dtype, device):
    x, table, shared = (each.float().to(device) for each in inputs((2, 5, 72)))
    arguments = {
        "ln_modulate": (x, table, shared, 3, False, out_dtype, True),
        "ln_modulate_backward": (
            x.to(out_dtype or x.dtype),
            x.clone(),
            torch.randn(2, 5, 2, device=device),
            table,
            shared,
            3,
        ),
        "ln_modulate_fp8": (x, table, shared, 3),
    }[name]
    if name == "ln_modulate":
        for each in arguments[:3]:
            each.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "fp8" not in name:  # opcheck adds up outputs, which e4m3 cannot
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.pixart_rt, name).default, arguments, test_utils=checks)


MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.mark.parametrize(("dtype", "out_dtype"), MIXED)
def test_y_in_another_dtype_than_x(dtype, out_dtype, device, error, tolerance):
    """Autocast: x and the parameters are float32, y and its gradient have 16 bits."""
    x, table, shared = (each.to(dtype) for each in inputs((2, 5, 144)))
    leaves = [each.to(device).requires_grad_() for each in (x, table, shared)]
    y = op.ln_modulate(*leaves, 3, out_dtype=out_dtype)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(out_dtype)
    gradients = torch.autograd.grad(y, leaves, dy.to(device))
    wide = [each.double().requires_grad_() for each in (x, table, shared)]
    expected = op.ln_modulate_ref(*wide, 3)
    assert y.dtype == out_dtype
    assert error(y, expected) < tolerance[out_dtype]
    exact = torch.autograd.grad(expected, wide, dy.double())
    for actual, oracle in zip(gradients, exact, strict=True):
        assert actual.dtype == dtype
        assert error(actual, oracle) < 2 * tolerance[dtype]


@pytest.mark.parametrize("rows", [2, 4])
def test_tiles_of_several_rows(rows, device, error, tolerance):
    """What many tokens select, with a last tile that is not full; statistics are stored too."""
    x, table, shared = (each.float() for each in inputs((2, 2 * rows + 1, 144)))
    given = [each.to(device) for each in (x, table, shared)]
    with launch.forcing("ln_modulate", {"ROWS": rows, "num_warps": 4}):
        y, _, stats = op.ln_modulate_triton(*given, 3, stats=True)
    assert error(y, op.ln_modulate_ref(x.double(), table, shared, 3)) < tolerance[torch.float32]
    assert error(stats, op.row_stats(x.double())) < tolerance[torch.float32]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    exact = op.ln_modulate_backward_ref(
        dy.double(), x.double(), op.row_stats(x.double()), table, shared, 3
    )
    with launch.forcing("ln_modulate_backward", {"ROWS": 2 * rows, "TILE": rows}):
        dx, _, sums = op.ln_modulate_backward_triton(dy.to(device), given[0], stats, *given[1:], 3)
    assert error(dx, exact[0]) < 2 * tolerance[torch.float32]
    assert error(sums, exact[1][:, 3:5]) < 2 * tolerance[torch.float32]


def test_inference_stores_no_statistics(device):
    x, table, shared = (each.float().to(device) for each in inputs((1, 3, 72)))
    forward = torch.ops.pixart_rt.ln_modulate.default
    assert forward(x, table, shared, 3, False, None, False)[1].numel() == 0
    y = forward(x.requires_grad_(), table, shared, 3, False, None, False)[0]
    with pytest.raises(AssertionError, match="statistics"):
        y.sum().backward()


def test_small_images_have_enough_programs():
    """At 256 px with guidance, 512 tokens, every one of 132 multiprocessors has work."""
    for tokens in (512, 1024, 2048, 8192):
        with launch.record((9, 0)) as recorded:
            op.compile_example(torch.bfloat16, 2, tokens // 2)
        assert all(each.grid[0] * each.grid[1] >= 128 for each in recorded)
