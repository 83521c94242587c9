"""One rank of test_sharded_step.py: RANK STORE, two ranks in all, on the CPU.

Takes steps of a sharded model and of the same model whole, one of them with a NaN, and compares
weights and averages. Exits with 0 if they agree.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pixart_rt.training.optim.came import CAME
from pixart_rt.training.optim.clipping import clip_gradients, step_if_finite
from pixart_rt.training.optim.ema import Ema

STEPS = ("finite", "NaN", "finite")


def walk(model: nn.Module, kind: str) -> tuple[Ema, list[float]]:
    """Three steps; the averages, and the norm of each step."""
    if kind == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    else:
        optimizer = CAME(model.parameters(), 0.1)
    ema, norms = Ema(model, 0.9), []
    for step in STEPS:
        model(torch.ones(4, 6)).square().sum().backward()
        if step == "NaN":
            for parameter in model.parameters():
                parameter.grad *= torch.nan
        norm, found_inf = clip_gradients(model.parameters(), 0.1)
        assert found_inf.item() == (step == "NaN")
        step_if_finite(optimizer, found_inf)
        optimizer.zero_grad()
        ema.update()
        norms.append(norm.item())
    return ema, norms


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for kind in ("AdamW", "CAME"):
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))  # 5 and 3 rows: unequal shards
        sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
        start = whole[0].weight.detach().clone()
        (ema, norms), (expected, wanted) = walk(sharded, kind), walk(whole, kind)
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=0, equal_nan=True)
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, atol=1e-5, rtol=0)
        for name, average in ema.averages.items():
            torch.testing.assert_close(
                average.full_tensor(), expected.averages[name], atol=1e-5, rtol=0
            )
        assert (whole[0].weight - start).abs().max() > 0.05
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
