"""How an objective is spread over ranks: whole on each (DDP), or divided block by block (FSDP2).

    forward = spread(objective, settings, ranks)     call it instead of the objective
    with forward.accumulating(last): ...             gradients are exchanged in the last micro-batch

A block of the text model ends with the normalization of the next one, whose table FSDP has not
gathered then. So the tables (28 x 6 x 1152 numbers in XL/2) stay whole on every rank, as DTensors
that are replicated, and their gradients are averaged by one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.fx.experimental import _config as shapes_config
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pixart_rt.config import Precision
from pixart_rt.errors import ConfigError
from pixart_rt.kernels.checkpointing import policy
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.transformer import read_locally
from pixart_rt.training.objectives.denoising import Objective
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.run_settings import Checkpointing, Parallel, RunSettings

TABLE = "scale_shift_table"


class Spread:
    """An objective that is called on every rank with that rank's samples."""

    def __init__(self, forward: nn.Module, replicated: Sequence[nn.Parameter] = ()) -> None:
        self.forward, self.replicated = forward, list(replicated)

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        # Where numbers of images, tokens and words happen to be equal once, a compiled block must
        # not expect them to be so again.
        # DDP's buckets do not cut blocks, which are compiled one by one as they are.
        shapes = shapes_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with shapes, dynamo_config.patch(optimize_ddp=False):
            return cast(dict[str, Tensor], self.forward(*inputs))

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward; gradients are exchanged in the last."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
            self.forward.set_is_last_backward(last)
            yield
        elif isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def average_replicated(self) -> None:
        """The gradients of what FSDP left whole become their mean over all ranks."""
        found = [each.grad for each in self.replicated if each.grad is not None]
        gradients = [each.to_local() for each in found if isinstance(each, DTensor)]
        if not gradients:
            return
        flat = torch.cat([each.flatten() for each in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        sizes = [each.numel() for each in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


def spread(objective: Objective, settings: RunSettings, ranks: Ranks) -> Spread:
    """The objective checkpointed, compiled and shared as the settings say; it is changed in place.

    Its parameters are on the ranks' device already.
    """
    for unit in objective.units:
        _checkpoint(unit, settings.checkpointing)
        if settings.compile:
            unit.compile(dynamic=True)
    if ranks.num_ranks == 1 or settings.reproducible:
        return Spread(objective)
    if settings.parallel is Parallel.DDP:
        whole = DistributedDataParallel(
            objective, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        return Spread(whole)
    return _shard(objective, settings, mesh_of(settings.parallel, ranks))


def mesh_of(parallel: Parallel, ranks: Ranks) -> DeviceMesh:
    """All ranks for FSDP; nodes by the ranks of a node for HSDP."""
    kind, num_ranks, num_local = ranks.device.type, ranks.num_ranks, ranks.num_local
    if parallel is Parallel.FSDP:
        return init_device_mesh(kind, (num_ranks,), mesh_dim_names=("shard",))
    if num_ranks % num_local:
        raise ConfigError(
            f"{Parallel.HSDP} is not supported with {num_ranks} ranks on nodes of {num_local}; "
            "start the same number on every node"
        )
    shape = num_ranks // num_local, num_local
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _shard(objective: Objective, settings: RunSettings, mesh: DeviceMesh) -> Spread:
    whole = Precision.FP32 if mesh.device_type == "cpu" else settings.precision
    blocks = MixedPrecisionPolicy(  # what autocast would make of the weights, before they travel
        param_dtype=DTYPES[whole], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    read_locally(DTensor)
    tables = []
    for unit in objective.units:
        ignored = set()
        if hasattr(unit, TABLE):
            placed = DTensor.from_local(
                getattr(unit, TABLE).data, mesh, [Replicate()] * mesh.ndim, run_check=False
            )
            table = nn.Parameter(placed, requires_grad=getattr(unit, TABLE).requires_grad)
            setattr(unit, TABLE, table)
            ignored.add(table)
            tables.append(table)
        fully_shard(unit, mesh=mesh, mp_policy=blocks, ignored_params=ignored)
    fully_shard(
        objective,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        ignored_params=set(tables),
    )
    return Spread(objective, tables)


def _checkpoint(unit: nn.Module, kind: Checkpointing) -> None:
    if kind is Checkpointing.NONE:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind is Checkpointing.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    forward: Callable[..., Any] = unit.forward

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **kwargs, **options)

    unit.forward = checkpointed
