"""The processes of a run, as torchrun starts them; one process without it.

    with start_ranks() as ranks: ...

Every rank has a device of its own; the CPU where there is no GPU. Gloo carries what is on the CPU
(checkpoints, agreement), NCCL what is on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pixart_rt.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the others. `local` counts are of its node."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local: int
    device: torch.device
    writers: dist.ProcessGroup  # of all ranks, for checkpoints: written while the others compute

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes for people."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def is_first_rank() -> bool:
    """Whether this process is the one that writes for people, also before its ranks are started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def start_ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the run that torchrun started, or be the only rank. `device`: "cpu" or "cuda".

    Raises ConfigError where a device is asked that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(
            f"`device` {kind} is not supported; choose cpu, or cuda: each rank has a GPU"
        )
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"Slurm started {os.environ['SLURM_NTASKS']} tasks that do not know each other; start "
            "one torchrun on every node (examples/train.slurm)"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda was requested and PyTorch finds no GPU; use `device=cpu`")
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if all(name in os.environ for name in VARIABLES):
        rank, num_ranks, local_rank, num_local = (int(os.environ[name]) for name in VARIABLES)
        place = _place(kind, local_rank)
        dist.init_process_group(backend)
    else:  # a group of one, so that nothing after this asks whether there is a group
        rank, num_ranks, local_rank, num_local = 0, 1, 0, 1
        place = _place(kind, local_rank)
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in its list of exports
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Ranks(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            num_local=num_local,
            device=place,
            writers=dist.new_group(backend="gloo"),
        )
    except BaseException:
        if num_ranks == 1:  # with others it would wait for them, and they for this rank's share
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _place(kind: str, local_rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()}; start "
            "one rank for each"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
