"""Run one step again, as it was, and say what in it was not finite.

    report = replay(trainer, 1234)

From the newest checkpoint before the step, by the same steps: weights, samples and draws are those
of the run, bit-identical on the same machine. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pixart_rt.errors import CheckpointError
from pixart_rt.training.optim.clipping import clip_gradients
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.trainer import Trainer


def replay(trainer: Trainer, step: int) -> dict[str, Any]:
    """What step `step`, counted from 0, did: losses of every sample, the norm, what was not finite.

    Raises CheckpointError where no checkpoint is as old, other than the beginning of the run.
    """
    steps = [each for each in trainer.checkpoints.steps() if each <= step]
    if steps:
        trainer.resume(steps[-1])
    elif trainer.checkpoints.steps():
        kept = trainer.checkpoints.steps()[0]
        raise CheckpointError(
            f"step {step} was requested, but the oldest checkpoint is of step {kept}; replay a "
            "later one, or run from the beginning in another folder with more of them kept"
        )
    begun = trainer.done
    batches = iter(trainer.feed(begun, step + 1))
    for _ in range(begun, step):
        trainer.step(next(batches))
    batch = next(batches)
    draws = draw(trainer.settings.seed, step, batch)
    place = trainer.ranks.device
    with watched(trainer.objective) as strange:
        losses = trainer.backward(batch.to(place), draws.to(place))
    trainer.loss_scale.unscale(trainer.parameters)
    names = [
        name
        for name, each in trainer.objective.named_parameters()
        if each.grad is not None and not _finite(each.grad)
    ]
    norm, found_inf = clip_gradients(trainer.parameters, trainer.settings.clip_norm)
    trainer.optimizer.zero_grad()
    mine = {
        "ids": batch.ids.tolist(),
        **{name: values.tolist() for name, values in losses.items()},
        "first_output_not_finite": strange[0] if strange else None,
        "gradients_not_finite": names,
    }
    ranks: list[Any] = [None] * trainer.ranks.num_ranks
    dist.all_gather_object(ranks, mine)
    bucket = batch.bucket
    return {
        "step": step, "from_checkpoint": begun, "height": bucket.height, "width": bucket.width,
        "seed": trainer.settings.seed, "norm": norm.item(), "finite": not found_inf.item(),
        "ranks": ranks,
    }  # fmt: skip


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of modules in the order in which they gave something that was not finite."""
    strange: list[str] = []

    def hook(name: str) -> RemovableHandle:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if any(not _finite(each) for each in _tensors(output)):
                strange.append(name)

        return modules[name].register_forward_hook(look)

    modules = dict(model.named_modules())
    handles = [hook(name) for name in modules if name]
    try:
        yield strange
    finally:
        for each in handles:
            each.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)


def _finite(tensor: Tensor) -> bool:
    local = getattr(tensor, "to_local", None)
    values = tensor if local is None else local()
    return bool(torch.isfinite(values).all())
