"""fp8 linears against their formulas in float32, and quantization by rows."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.kernels import fp8_linear as op
from pixart_rt.kernels import launch
from pixart_rt.kernels.ln_modulate import E4M3_MAX, quantize_rows_ref

SHAPES = [(1, 1, 72, 40), (3, 37, 144, 200), (1, 37, 1152, 1152)]  # B, N, I, O
DTYPES = [torch.float16, torch.float32]


def inputs(shape, dtype):
    """Quantized x and weight, bias, table, shared, residual; the references take the same fp8."""
    random = torch.Generator().manual_seed(0)
    B, N, I, O = shape
    x, weight = torch.randn(B, N, I, generator=random), torch.randn(O, I, generator=random)
    x[..., 5] *= 30
    bias, table = torch.randn(O, generator=random), torch.randn(6, O, generator=random)
    shared, residual = (
        torch.randn(B, 6, O, generator=random),
        torch.randn(B, N, O, generator=random),
    )
    quantized = (*quantize_rows_ref(x), *quantize_rows_ref(weight / I**0.5))
    return *quantized, bias.to(dtype), table.to(dtype), shared, residual.to(dtype)


def moved(tensors, device):
    return [each.to(device) for each in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_the_same_fp8_are_the_same(shape, dtype, device, error, tolerance):
    *quantized, bias, table, shared, residual = inputs(shape, dtype)
    bound = 5 * tolerance[dtype]
    here = moved(quantized, device)
    for ours, reference in (
        (op.fp8_linear, op.fp8_linear_ref),
        (op.fp8_linear_gelu, op.fp8_linear_gelu_ref),
    ):
        actual = ours(*here, bias.to(device), dtype)
        assert actual.dtype == dtype
        assert error(actual, reference(*quantized, bias, torch.float32)) < bound
    for gate in ((table, shared, 5), (None, None, 0)):
        there = [each.to(device) if isinstance(each, torch.Tensor) else each for each in gate]
        actual = op.fp8_linear_residual(*here, bias.to(device), *there, residual.to(device))
        expected = op.fp8_linear_residual_ref(*quantized, bias, *gate, residual)
        assert error(actual, expected) < bound


@pytest.mark.parametrize("shape", [(1, 1, 72, 40), (3, 37, 200, 72), (2, 37, 1152, 40)])
def test_products_of_inputs_with_scales_of_groups(shape, device, error, tolerance):
    """Groups of 128 columns, the last one cut, each token's and group's own scale."""
    *quantized, bias, table, shared, residual = inputs(shape, torch.float32)
    x = op.dequantized(*quantized[:2])
    x[..., 128:] *= 50  # a group's scale in the place of another would show
    x8, scale = op.quantize_groups_ref(x)
    assert scale.shape == (shape[0], -(-shape[2] // 128), shape[1])
    given = (x8, scale, *quantized[2:])
    exact = (
        op.dequantized(x8, scale.double())
        @ op.dequantized(quantized[2][None], quantized[3][None].double()).mT
        + bias.double()
    )
    here = moved(given, device)
    actual = op.fp8_linear(*here, bias.to(device), torch.float32)
    assert error(actual, exact) < 5 * tolerance[torch.float32]
    gate = (table.to(device), shared.to(device), 5)
    actual = op.fp8_linear_residual(*here, bias.to(device), *gate, residual.to(device))
    vector = (table[5] + shared[:, 5, None]).double()
    assert error(actual, residual + vector * exact) < 5 * tolerance[torch.float32]


@pytest.mark.parametrize("shape", [(1, 1, 72, 40), (3, 37, 144, 200), (1, 70, 72, 1152)])
def test_gelu_writes_fp8_with_the_scales_of_its_groups(shape, device, error):
    *quantized, bias, _, _, _ = inputs(shape, torch.float32)
    quantized[2][:40] = 0  # GELU of the bias alone: the smallest values, in a group of their own
    y8, scale = op.fp8_linear_gelu_quantized(*moved(quantized, device), bias.to(device))
    assert (y8.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    wide = op.fp8_linear_ref(
        quantized[0], quantized[1].double(), quantized[2], quantized[3].double(), bias,
        torch.float64,
    )  # fmt: skip
    exact = torch.nn.functional.gelu(wide, approximate="tanh")
    assert y8.shape == exact.shape
    parts = exact.abs().split(128, -1)
    largest = torch.stack([part.amax(-1) for part in parts], 1)
    torch.testing.assert_close(scale.cpu().double(), largest / E4M3_MAX, rtol=1e-5, atol=0)
    # Half a step of 3 bits when rounded, a whole one in the interpreter, which truncates.
    bound = 0.04 if y8.is_cuda else 0.08
    assert error(op.dequantized(y8.cpu(), scale.cpu()), exact) < bound


def test_scales_of_groups_lose_no_more_than_scales_of_rows(error):
    """GELU's output with outliers in few columns, as in a model, in both forms."""
    random = torch.Generator().manual_seed(0)
    y = torch.nn.functional.gelu(torch.randn(2, 37, 1152, generator=random))
    y[..., 700:704] *= 3e4  # under a row's scale the others fall below e4m3's smallest value
    rows = op.dequantized(*quantize_rows_ref(y))
    groups = op.dequantized(*op.quantize_groups_ref(y))
    for columns, worse in ((slice(None), 1.0), (slice(640), 0.5)):
        assert error(groups[..., columns], y[..., columns]) <= worse * error(
            rows[..., columns], y[..., columns]
        )


def test_pytorchs_product_where_a_table_names_it(device, error, monkeypatch):
    """Its arguments, and the cases that it does not take."""
    *quantized, bias, _, _, _ = inputs((3, 37, 144, 208), torch.bfloat16)
    here, expected = moved(quantized, device), None
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        calls.append(use_fast_accum)
        assert b.stride() == (1, 144)  # column-major, as the library wants it
        assert scale_a.shape == (3 * 37, 1) and scale_b.shape == (1, 208)
        y = (a.double() * scale_a) @ (b.double() * scale_b) + bias.double()
        return y.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    expected = op.fp8_linear_ref(*quantized, bias, torch.float32)
    with launch.choosing("fp8_linear", "scaled_mm"):
        actual = op.fp8_linear(*here, bias.to(device), torch.bfloat16)
        assert calls == [True] and actual.dtype == torch.bfloat16
        assert error(actual, expected) < 1e-2
        half = op.fp8_linear(*here, bias.half().to(device), torch.float16)
        op.fp8_linear_gelu(*here, bias.to(device), torch.bfloat16)
        groups = op.quantize_groups_ref(op.dequantized(*quantized[:2]))
        op.fp8_linear(*moved(groups, device), *here[2:], bias.to(device), torch.bfloat16)
    assert calls == [True]  # ours ran for the others
    assert error(half, expected) < 1e-2
    assert op.fp8_linear(*here, bias.to(device), torch.bfloat16).shape == (3, 37, 208)
    assert calls == [True]  # and without a table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 1152, 4608])
def test_quantize_rows(width, dtype, device, error):
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0  # a row of zeros has a scale, and no NaN
    y, scale = op.quantize_rows(x.to(device))
    assert y.dtype == torch.float8_e4m3fn
    expected = x.double().abs().amax(-1).clamp(min=1e-12) / E4M3_MAX
    torch.testing.assert_close(scale.cpu().double(), expected, rtol=1e-6, atol=0)
    # Half a step of 3 bits when rounded, a whole one in the interpreter, which truncates.
    assert error(y.float() * scale[..., None], x) < (0.04 if y.is_cuda else 0.08)


def test_every_operator_asks_by_the_name_that_the_self_test_refuses(device, monkeypatch):
    asked = set()
    monkeypatch.setattr(op, "runs_triton", lambda name, *_: bool(asked.add(name)))
    for each in op.OPERATORS:
        each.run(*each.example(device, torch.float16, 0))
    assert asked == {each.name for each in op.OPERATORS}


def test_compiles_whole_with_any_number_of_tokens(device):
    def step(x, weight, weight_scale, bias, table, shared, residual):
        x8, scale = op.quantize_rows(x)
        y = op.fp8_linear_gelu(x8, scale, weight, weight_scale, bias, x.dtype)
        gate = (table, shared, 5)
        out = op.fp8_linear_residual(x8, scale, weight, weight_scale, bias, *gate, residual)
        hidden, groups = op.fp8_linear_gelu_quantized(x8, scale, weight, weight_scale, bias)
        second = weight[:, :40].contiguous()
        out = out + op.fp8_linear(hidden, groups, second, weight_scale, bias, x.dtype)
        return y + out + op.fp8_linear(x8, scale, weight, weight_scale, bias, x.dtype)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for N in (5, 9):
        _, _, weight, weight_scale, *rest = moved(inputs((2, N, 72, 40), torch.float32), device)
        x = torch.randn(2, N, 72, generator=torch.Generator().manual_seed(1)).to(device)
        for each in (x, rest[-1]):
            torch._dynamo.mark_dynamic(each, 1)
        arguments = (x, weight, weight_scale, *rest)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize(
    "name", ["quantize_rows", "fp8_linear", "fp8_linear_gelu_quantized", "fp8_linear_residual"]
)
def test_registration(name, device):
    *quantized, bias, table, shared, residual = moved(inputs((2, 5, 72, 40), torch.float32), device)
    arguments = {
        "quantize_rows": (residual,),
        "fp8_linear": (*quantized, bias, True, torch.float32),
        "fp8_linear_gelu_quantized": (*quantized, bias),
        "fp8_linear_residual": (*quantized, bias, table, shared, 5, residual),
    }[name]
    checks = ["test_autograd_registration", "test_faketensor"]
    if name == "quantize_rows":  # the others of opcheck do arithmetic on inputs, which e4m3 has not
        checks.append("test_schema")
    torch.library.opcheck(getattr(torch.ops.pixart_rt, name).default, arguments, test_utils=checks)
