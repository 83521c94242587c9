"""torch.export is told from torch.compile, on every supported PyTorch."""

import pytest
import torch
from torch import Tensor, nn

from pixart_rt.kernels.launch import exporting


class Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if exporting() else 2)


def test_a_compiled_graph_is_not_exported():
    torch._dynamo.reset()
    compiled = torch.compile(Tells(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == Tells()(torch.zeros(1)).item() == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is(strict):
    program = torch.export.export(Tells(), (torch.zeros(1),), strict=strict)
    assert program.module()(torch.zeros(1)).item() == 1
    assert not exporting()
