"""Muon against torch.optim's Muon and AdamW, which parameters it turns, and a resumed run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.muon import Muon, muon_groups, orthogonalized
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import OptimizerKind, RunSettings

spec = importlib.util.spec_from_file_location(
    "small_run", Path(__file__).parents[1] / "small_run.py"
)
assert spec is not None and spec.loader is not None
small_run = sys.modules["small_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_run)
SHAPES = [(7, 3), (3, 7), (7, 3), (1, 5), (4, 4), (6,), (2, 3, 4)]  # two alike, a row, no matrices


@pytest.mark.parametrize(("products", "near"), [(None, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(5, 9, 4), (3, 4, 9), (1, 1, 6)])
def test_orthogonalized_keeps_the_singular_vectors(shape, products, near):
    """Oracle: the SVD in float64. Singular values end between 0.5 and 1.5 by construction of the
    polynomial, where they were not tiny against the norm. In bfloat16 fifteen products are
    rounded to 2**-8, and each iteration enlarges what is small by up to 3.4."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = orthogonalized(matrices, products).double()
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = u.mT @ found @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.5 and values.max() < 1.5
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=near, rtol=0)


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_steps_are_torchs(products):
    """torch.optim.Muon orthogonalizes in bfloat16, ours on a CPU in float32 unless told so. Three
    steps go 0.06 to 0.16; five iterations of three products, each rounded to 2**-8, may cost a
    tenth of that."""
    random = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=random).requires_grad_() for shape in SHAPES]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    mine = Muon(ours, 0.1, (0.8, 0.9), 1e-6, weight_decay=0.3, products=products)
    matrices = [each for each in theirs if each.dim() == 2]
    others = [each for each in theirs if each.dim() != 2]
    muon = torch.optim.Muon(
        matrices, 0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, 0.1, (0.8, 0.9), 1e-6, weight_decay=0.3)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        mine.step()
        muon.step()
        adamw.step()
    for one, other in zip(ours, theirs, strict=True):
        tolerance = 0.008 if one.dim() == 2 else 1e-6
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def test_what_is_turned_are_the_matrices_of_the_blocks():
    objective = small_run.make_objective()
    groups = muon_groups(objective, objective.units)
    names = {id(each): name for name, each in objective.named_parameters()}
    turned, rest = ([names[id(each)] for each in group["params"]] for group in groups)
    assert [group["muon"] for group in groups] == [True, False]
    assert sorted([*turned, *rest]) == sorted(names.values())
    assert all(".blocks." in name and name.endswith("weight") for name in turned)
    assert len(turned) == 3 * 7 and "model.blocks.0.scale_shift_table" in rest


def test_a_run_goes_on_exactly(tmp_path):
    with start_ranks("cpu") as ranks:

        def run(out: str, steps: int) -> str:
            trainer = small_run.make_trainer(
                tmp_path / out, steps, ranks, optimizer=OptimizerKind.MUON
            )
            trainer.run()
            kinds = [group["muon"] for group in trainer.optimizer.param_groups]
            assert kinds == [True, False]
            return small_run.digest(trainer)

        whole = run("whole", 5)
        run("parts", 3)
        assert run("parts", 5) == whole


def test_divided_parameters_are_refused():
    with start_ranks("cpu"):
        model = nn.Linear(4, 4)
        fully_shard(model)
        with pytest.raises(ConfigError, match=r"divided over ranks \(FSDP\); use DDP"):
            Muon(model.parameters())


def test_the_rate_falls_by_half_a_cosine_over_the_last_steps():
    settings = RunSettings(steps=8, lr=2.0, warmup=Warmup(steps=2), decay=0.5)
    rates = [settings.rate(step) for step in range(9)]
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]
    assert rates == pytest.approx(expected)
    constant = RunSettings(steps=8, lr=2.0)
    assert {constant.rate(step) for step in range(8)} == {2.0}
    with pytest.raises(ConfigError, match="decay must be between"):
        RunSettings(steps=8, lr=2.0, decay=1.5)
