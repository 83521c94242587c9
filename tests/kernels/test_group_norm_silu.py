"""GroupNorm with SiLU against PyTorch's in float64, in both layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels import group_norm_silu as op
from pixart_rt.kernels.decompositions import decompositions

EPS = 1e-6
SHAPES = [  # (B, C, H, W) and groups
    ((1, 8, 1, 3), 4),  # less than a tile of anything
    ((2, 128, 9, 7), 32),  # an SD VAE's widths: 4, 8 and 16 channels a group
    ((1, 256, 5, 13), 32),
    ((2, 512, 8, 8), 32),
    ((3, 16, 37, 23), 1),  # the tiny VAE's widths: one group of all channels
    ((2, 64, 17, 5), 1),
    ((2, 96, 11, 3), 32),  # 3 channels a group: no power of two
    ((1, 200, 6, 50), 5),  # channels and groups that end inside a tile
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x with a mean far from zero and an outlier channel; weight and bias of both signs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random) + 4
    x[:, 5] *= 50
    weight, bias = torch.randn(2, shape[1], generator=random)
    return [each.to(dtype) for each in (x, weight, bias)]


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True) -> Tensor:
    y = F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(shape, groups, dtype, layout, device, error, tolerance):
    x, weight, bias = inputs(shape, dtype)
    given = x.to(device).contiguous(memory_format=layout)
    y = op.group_norm_silu(given, weight.to(device), bias.to(device), groups, EPS)
    assert y.dtype == dtype and y.stride() == given.stride()
    assert error(y, exact(x, weight, bias, groups)) < tolerance[dtype]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
def test_without_the_activation(layout, device, error, tolerance):
    x, weight, bias = inputs((2, 96, 9, 7), torch.float32)
    given = x.to(device).contiguous(memory_format=layout)
    y = op.group_norm_silu(given, weight.to(device), bias.to(device), 32, EPS, False)
    assert error(y, exact(x, weight, bias, 32, silu=False)) < tolerance[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
def test_many_parts_and_several_tiles_each(layout, device, error, monkeypatch):
    """What only large images reach: parts of several tiles, the last of them short."""
    monkeypatch.setattr(op, "DEFAULT", {"TILE": 256, "num_warps": 4})
    monkeypatch.setattr(op, "MAX_PARTS", 5)
    monkeypatch.setattr(op, "GROUP_TILE", 16)
    x, weight, bias = inputs((1, 12, 41, 23), torch.float32)
    x += torch.linspace(0, 40, 23)  # pixels that differ from part to part
    given = x.to(device).contiguous(memory_format=layout)
    y = op.group_norm_silu(given, weight.to(device), bias.to(device), 4, EPS)
    assert error(y, exact(x, weight, bias, 4)) < 2e-6


def test_a_mean_far_from_zero_costs_no_digits(device, error):
    """Sums of squares would lose all of them: the mean is 4000 deviations from zero."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 8, 40, 40, generator=random) + 4096
    weight, bias = torch.ones(8), torch.zeros(8)
    y = op.group_norm_silu(x.to(device), weight.to(device), bias.to(device), 2, EPS, False)
    assert error(y, exact(x, weight, bias, 2, silu=False)) < 1e-3  # one ulp of the mean is 4.9e-4


def test_equal_inputs_give_equal_outputs(device):
    x, weight, bias = (each.to(device) for each in inputs((2, 128, 33, 9), torch.float32))
    first, second = (op.group_norm_silu(x, weight, bias, 32, EPS) for _ in range(2))
    assert torch.equal(first, second)


def test_a_view_that_is_neither_layout_is_copied(device, error):
    x, weight, bias = inputs((2, 32, 10, 12), torch.float32)
    view = x.to(device)[:, :, ::2, 1:]
    y = op.group_norm_silu(view, weight.to(device), bias.to(device), 8, EPS)
    assert y.is_contiguous()
    assert error(y, exact(x[:, :, ::2, 1:], weight, bias, 8)) < 2e-6


def test_without_a_kernel_the_reference_keeps_the_layout(monkeypatch):
    monkeypatch.setattr(op, "runs_triton", lambda *_: False)
    x, weight, bias = inputs((2, 32, 4, 6), torch.float32)
    for layout in LAYOUTS:
        given = x.contiguous(memory_format=layout)
        y = op.group_norm_silu(given, weight, bias, 8, EPS)
        assert y.stride() == given.stride()
        torch.testing.assert_close(y.double(), exact(x, weight, bias, 8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
def test_registration(layout, device):
    x, weight, bias = (each.to(device) for each in inputs((2, 16, 5, 6), torch.float32))
    x = x.contiguous(memory_format=layout)
    forward = torch.ops.pixart_rt.group_norm_silu.default
    torch.library.opcheck(forward, (x, weight, bias, 4, EPS, True))


# torch's own, when it copies an exported program
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_an_exported_program_is_taken_apart_into_pytorch_s_operators(device):
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return op.group_norm_silu(x, weight, bias, 4, EPS)

    given = tuple(inputs((2, 16, 5, 6), torch.float32))
    program = torch.export.export(Norm(), given).run_decompositions(decompositions())
    assert not any("pixart_rt" in str(node.target) for node in program.graph.nodes)
    actual = program.module()(*given).double()
    torch.testing.assert_close(actual, exact(*given, 4), atol=1e-5, rtol=1e-5)
