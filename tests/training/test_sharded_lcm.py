"""Consistency distillation whose three models two ranks share (FSDP2): the numbers of one rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

RANK = Path(__file__).with_name("sharded_lcm.py")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_ranks_distil_as_one(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), tmp_path / "store"],
            cwd=RANK.parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
