"""The loop: batches in, optimiser steps, averages, log lines and checkpoints out.

    trainer = Trainer(objective, feed, settings, out, ranks)
    trainer.run()

    out/checkpoints/    checkpoints.py
    out/log.jsonl       a line every `log_every` steps (log_writers.py)
    out/skipped.jsonl   the samples of steps that were not finite; replay.py runs one again

A step is a function of the state and of (seed, step): all that is random is drawn for a sample's id
(sample_rng.py). So a run that was killed resumes as if it had not been. The step never waits for
the device; values are read where a line is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from pixart_rt.buckets import Bucket
from pixart_rt.config import Precision
from pixart_rt.data.batch import Batch
from pixart_rt.errors import CheckpointError, ConfigError, TrainingError
from pixart_rt.files import locked, replacing
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.training.checkpoints import FOLDER as CHECKPOINTS
from pixart_rt.training.checkpoints import Checkpoints, Progress, State
from pixart_rt.training.communication import profiled
from pixart_rt.training.distributed import spread
from pixart_rt.training.flops import peak_flops
from pixart_rt.training.log_writers import JSONL, Log, open_log
from pixart_rt.training.metrics import Meter
from pixart_rt.training.objectives.denoising import TIMESTEPS, Objective
from pixart_rt.training.optim.clipping import clip_gradients, step_if_finite
from pixart_rt.training.optim.ema import Ema
from pixart_rt.training.optim.factory import make_optimizer
from pixart_rt.training.optim.learning_rate import set_lr
from pixart_rt.training.optim.loss_scale import LossScale
from pixart_rt.training.optim.muon import muon_groups
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.reproducible_sums import TreeSum, sum_over_ranks, take_gradients
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Place, RunSettings
from pixart_rt.training.sample_rng import Draws, draw
from pixart_rt.training.sampler import SAMPLE_ORDER

_log = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
LOCK = ".lock"  # held while a run writes to its folder
SKIPPED_IN_A_ROW = 50  # end the run; fp16's loss scale has found its place after about 20
LAST_WAIT = 120.0  # seconds for the checkpoint in flight when a run fails
_OPTIONS = StateDictOptions(ignore_frozen_params=True)


class Feed(Protocol):
    """Where batches come from: those of this rank for the steps start..stop-1, in order."""

    def __call__(self, start: int, stop: int) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did, on the device: losses by term [B of this rank], the norm of the gradients []
    before clipping, and 1.0 where it was not finite and changed nothing []."""

    losses: dict[str, Tensor]
    norm: Tensor
    found_inf: Tensor
    lr: float


@dataclass(frozen=True, slots=True)
class _Undecided:
    """A step of which the host does not know yet whether it was finite."""

    step: int
    found_inf: Tensor
    ids: list[int]
    bucket: Bucket


class Trainer:
    """One phase on one rank of a run.

    `objective` is on any device; it is moved to the ranks'. `out` is the run's folder. `identity`
    adds to what must be the same when the run is resumed: the data, its sampler. `validation` is
    given whole weights, the averages if there are any, on the first rank alone.
    """

    def __init__(
        self,
        objective: Objective,
        feed: Feed,
        settings: RunSettings,
        out: Path,
        ranks: Ranks,
        *,
        identity: Mapping[str, Any] | None = None,
        log: Collection[Place] = (Place.JSONL,),
        validation: Callable[[dict[str, Tensor], int], None] | None = None,
    ) -> None:
        if settings.micro_batches % ranks.num_ranks:
            raise ConfigError(
                f"{settings.micro_batches} micro-batches were requested on {ranks.num_ranks} "
                "ranks; use a multiple of the ranks"
            )
        if settings.profile_every is not None and ranks.device.type != "cuda":
            raise ConfigError(
                f"profile_every was requested on {ranks.device.type}; what communicates is told "
                "from a GPU's kernels: leave it out"
            )
        if settings.reproducible and ranks.num_ranks & (ranks.num_ranks - 1):
            raise ConfigError(
                f"reproducible was requested on {ranks.num_ranks} ranks, which do not pair up in a "
                "tree; use a power of two"
            )
        if not any(each.requires_grad for each in objective.parameters()):
            raise ConfigError("nothing is to be trained: no parameter requires a gradient")
        self.settings, self.ranks, self.feed, self.out = settings, ranks, feed, Path(out)
        self.objective = objective.to(ranks.device).train()
        self._spread = spread(objective, settings, ranks)
        self.parameters = [each for each in objective.parameters() if each.requires_grad]
        self.optimizer = make_optimizer(
            settings.optimizer,
            muon_groups(objective, objective.units)
            if settings.optimizer is OptimizerKind.MUON
            else self.parameters,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            products=torch.bfloat16 if settings.precision is Precision.BF16 else None,
        )
        self.ema: Ema | None = None
        if settings.ema_decay is not None:
            device = "cpu" if settings.ema_on_cpu else None
            self.ema = Ema(objective, settings.ema_decay, device)
        self.loss_scale = LossScale(ranks.device, settings.precision is Precision.FP16)
        self.skipped = torch.zeros((), device=ranks.device)
        self.checkpoints = Checkpoints(out, ranks, settings.keep)
        self.identity = {
            "sample_order": SAMPLE_ORDER, **settings.identity(), **(identity or {})
        }  # fmt: skip
        self.done = 0  # steps
        self.saved: int | None = None  # the step of the newest checkpoint of this run or resumed
        self.log, self.validation = log, validation
        self.meter = self._new_meter()
        self._undecided: list[_Undecided] = []  # steps since the last log line
        self._skipped_in_a_row = 0

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, and save that one.

        Raises ConfigError where another run writes to this folder, before it reads anything.
        """
        with self._alone_in_the_folder():
            self._run()

    @contextmanager
    def _alone_in_the_folder(self) -> Iterator[None]:
        """The first rank holds a lock; what it found is told to all."""
        with ExitStack() as stack:
            problem = [self._take_folder(stack) if self.ranks.is_first else None]
            dist.broadcast_object_list(problem, src=0, group=self.ranks.writers)
            if problem[0] is not None:
                raise ConfigError(problem[0])
            self.out.mkdir(parents=True, exist_ok=True)
            yield

    def _take_folder(self, stack: ExitStack) -> str | None:
        """Lock the run's folder until `stack` ends; why that cannot be, else None."""
        names = (CHECKPOINTS, JSONL, SKIPPED)  # a run rewrites these
        taken = [name for name in names if (self.out / name).exists()]
        if taken and not (self.out / LOCK).exists():
            return (
                f"{self.out} holds {taken[0]}, but not of a run of pixart-rt; move it away, or "
                "choose another folder"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        if stack.enter_context(locked(self.out / LOCK)):
            return None
        return (
            f"{self.out} is being written to by another run; wait for it, or choose another folder"
        )

    def _run(self) -> None:
        self.resume()
        self._forget_skipped()
        steps = self.settings.steps
        if self.done < steps:
            with open_log(
                self.log, self.out, rank=self.ranks.rank, start=self.done, num_steps=steps
            ) as log:
                try:
                    self._walk(steps, log)
                except BaseException:  # also an interruption: keep what is written already
                    with suppress(CheckpointError):
                        self.checkpoints.finish(LAST_WAIT)
                    raise
        self.checkpoints.finish()
        self.ranks.barrier()  # the last one has its name
        if self.saved != self.done:  # the name alone may be that of a damaged one
            self.save()
            self.checkpoints.finish()
            self.ranks.barrier()

    def _walk(self, stop: int, log: Log) -> None:
        settings, batches = self.settings, iter(self.feed(self.done, stop))
        self.meter = self._new_meter()  # its clock begins here
        while self.done < stop:
            with self.meter.waiting():
                batch = next(batches)
            with self._profiled():
                result = self.step(batch)
            self.observe(result, batch)
            saving = self.done % settings.save_every == 0
            if saving or self.done % settings.log_every == 0 or self.done == stop:
                # before a checkpoint too: what a resumed run has not seen must be in the log
                line = self.meter.line(self.done, result.lr)
                log.write(line)
                self._note_skipped(line.skipped)
                self._refuse_skipping(stop)
            if saving:
                self.save()
            if settings.validate_every and self.done % settings.validate_every == 0:
                with self.meter.paused():
                    self._validate()
            self.checkpoints.poll()

    def _profiled(self) -> AbstractContextManager[None]:
        """Around the next step: profiled if it is one of those, which a log line follows."""
        every = self.settings.profile_every
        if every is None or (self.done + 1) % every:
            return nullcontext()
        return profiled(self.ranks.device, self.meter.communication)

    def observe(self, result: StepResult, batch: Batch) -> None:
        """Remember a step until its log line says whether it was finite."""
        self._undecided.append(
            _Undecided(self.done - 1, result.found_inf, batch.ids.tolist(), batch.bucket)
        )

    def _note_skipped(self, count: int) -> None:
        """Write down the samples of steps that were left out; their draws follow from them."""
        undecided, self._undecided = self._undecided, []
        if not count:
            self._skipped_in_a_row = 0
            return
        for each in undecided:
            if not each.found_inf.item():  # the same on all ranks
                self._skipped_in_a_row = 0
                continue
            self._skipped_in_a_row += 1
            ids: list[list[int]] = [[] for _ in range(self.ranks.num_ranks)]
            dist.all_gather_object(ids, each.ids)
            if not self.ranks.is_first:
                continue
            record = {
                "step": each.step, "seed": self.settings.seed, "ids": [i for r in ids for i in r],
                "height": each.bucket.height, "width": each.bucket.width,
            }  # fmt: skip
            with (self.out / SKIPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            _log.warning("step %d was not finite and changed nothing; --replay %d shows where",
                         each.step, each.step)  # fmt: skip

    def _refuse_skipping(self, stop: int) -> None:
        """Raise TrainingError, on all ranks, where steps have stopped changing anything."""
        count = self._skipped_in_a_row
        if count < SKIPPED_IN_A_ROW and (self.done < stop or 2 * count <= stop):
            return
        raise TrainingError(
            f"the last {count} of {self.done} steps were not finite and changed nothing; lower lr "
            f"({self.settings.lr:g}), or see {self.out / SKIPPED}"
        )

    def _forget_skipped(self) -> None:
        """Leave out records of steps that are taken again."""
        path = self.out / SKIPPED
        if not self.ranks.is_first or not path.exists():
            return
        records = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with replacing(path) as aside:
            kept = [line for line in records if json.loads(line)["step"] < self.done]
            aside.write_text("".join(kept), encoding="utf-8")

    def _validate(self) -> None:
        weights = self.weights(average=self.ema is not None)
        if self.validation is not None and self.ranks.is_first:
            self.validation(weights, self.done)
        self.ranks.barrier()

    def weights(self, *, average: bool, prefix: str = "") -> dict[str, Tensor]:
        """Whole weights of the objective on the CPU, by name; the averages of those that have one.

        Of those whose names begin with `prefix`. A collective where the model is sharded; ranks
        other than the first get nothing.
        """
        found = dict(self.objective.named_parameters())
        if average:
            assert self.ema is not None, "no average is kept"
            found |= self.ema.averages  # type: ignore[arg-type]  # tensors in place of parameters
        kept = {}
        for name, each in found.items():
            if not name.startswith(prefix):
                continue
            whole = each.full_tensor() if isinstance(each, DTensor) else each
            if self.ranks.is_first:
                kept[name] = whole.detach().cpu().clone()
        return kept

    def step(self, batch: Batch) -> StepResult:
        """One step of the optimiser on this rank's samples of step `done`."""
        settings = self.settings
        rate = settings.rate(self.done)
        set_lr(self.optimizer, rate)
        draws = draw(settings.seed, self.done, batch).to(self.ranks.device)
        losses = self.backward(batch.to(self.ranks.device), draws)
        del losses[TIMESTEPS]
        self.loss_scale.unscale(self.parameters)
        norm, found_inf = clip_gradients(self.parameters, settings.clip_norm)
        self.meter.step(norm, found_inf)
        step_if_finite(self.optimizer, found_inf)
        self.optimizer.zero_grad()  # after the step: before it, micro-batches would be lost
        self.loss_scale.update(found_inf)
        self.skipped += found_inf
        if self.ema is not None:
            self.ema.update(found_inf)
        self.objective.after_step(found_inf)
        self.done += 1
        return StepResult(losses, norm, found_inf, rate)

    def backward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Gradients of the mean loss over all ranks; what the objective gives for this rank."""
        mine = self.settings.micro_batches // self.ranks.num_ranks
        if len(batch) % mine:
            raise ConfigError(f"a batch of {len(batch)} does not divide into {mine} micro-batches")
        size = len(batch) // mine
        cuts = [(start, start + size) for start in range(0, len(batch), size)]
        tree = TreeSum() if self.settings.reproducible else None
        kept: dict[str, list[Tensor]] = {}
        full = self.settings.checkpointing is Checkpointing.FULL
        flops = self.objective.flops(batch.bucket, full)
        for start, stop in cuts:
            part = draws.rows(start, stop)
            with self._spread.accumulating(stop == len(batch)):
                with self.autocast():
                    losses = self._spread(batch.rows(start, stop), part)
                shares = self.settings.micro_batches if tree else mine
                self.loss_scale.scaled(losses["loss"].mean() / shares).backward()
            for name, values in losses.items():
                kept.setdefault(name, []).append(values.detach())
            t = losses.pop(TIMESTEPS)
            self.meter.micro_batch(losses, t, batch.bucket.num_tokens, flops)
            if tree:
                tree.add(take_gradients(self.parameters))
        if tree:
            total = sum_over_ranks(tree.result())
            for parameter, gradient in zip(self.parameters, total, strict=True):
                parameter.grad = gradient
        self._spread.average_replicated()
        return {name: torch.cat(values) for name, values in kept.items()}

    def _new_meter(self) -> Meter:
        peak = _peak(self.settings, self.ranks)
        return Meter(self.ranks.device, clip_norm=self.settings.clip_norm, peak=peak)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's precision; nothing for float32."""
        if self.settings.precision is Precision.FP32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, DTYPES[self.settings.precision])

    def state(self) -> State:
        """All that a step changes, as this rank holds it."""
        model, optimizer = get_state_dict(self.objective, self.optimizer, options=_OPTIONS)
        state = {"model": model, "optimizer": optimizer, "loss_scale": self.loss_scale.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return {**state, "objective": self.objective.own_state()}

    def save(self) -> None:
        """Begin a checkpoint of the steps done."""
        skipped = int(self.skipped.item())
        progress = Progress(step=self.done, skipped=skipped, identity=self.identity)
        self.checkpoints.save(self.state(), progress)
        self.saved = self.done

    def resume(self, step: int | None = None) -> None:
        """Resume from the newest whole checkpoint, or that of a step; without any, begin.

        Raises CheckpointError for one of another run, or where all are damaged.
        """
        chosen = step if step is not None else self.checkpoints.newest_whole()
        if chosen is None:
            return
        progress = self.checkpoints.progress(chosen)
        for name, value in self.identity.items():
            found = progress.identity.get(name)
            if found != value:
                raise CheckpointError(
                    f"{self.checkpoints.path(chosen)} was made with {name} {found}, this run has "
                    f"{value}; resume with the same `{name}`, or start in another folder"
                )
        if progress.step > self.settings.steps:
            raise CheckpointError(
                f"{self.settings.steps} steps were requested, {self.checkpoints.path(chosen)} has "
                f"{progress.step}; ask for more, or start in another folder"
            )
        state = self.state()
        self.checkpoints.load(state, chosen)
        set_state_dict(
            self.objective,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),  # what is frozen is not in it
        )
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.objective.load_own_state(state["objective"])
        self.skipped.fill_(progress.skipped)
        self.done = self.saved = progress.step


def _peak(settings: RunSettings, ranks: Ranks) -> float | None:
    if ranks.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(ranks.device), DTYPES[settings.precision])
