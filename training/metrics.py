"""What a log line says of the steps since the last one, collected without waiting for the device.

    with meter.waiting(): loaded = next(batches)
    meter.micro_batch(losses, timesteps, bucket.num_tokens, flops)      after each forward
    meter.step(norm, found_inf)                                         after clip_gradients
    line = meter.line(step, lr)                                         now and then; waits once

Losses, norms and counts are added up where they are, in float64 on the device. Losses of a step
that was skipped (found_inf) are dropped, its work is counted. With several ranks `line` is a
collective: every rank calls it and gets the same numbers of all, but for its own clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from pixart_rt.errors import ConfigError
from pixart_rt.training.flops import StepFlops

QUARTERS = 4  # of the timesteps: at 1000, 0..249 are nearly clean and 750..999 nearly noise

Quarters = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """The steps since the last line. Means are over images of all ranks; None is not known."""

    step: int  # steps of the optimiser that are done
    loss: float | None  # None where every step was skipped
    by_quarter: dict[str, Quarters]  # of each loss term; None for a quarter without a sample
    images_per_second: float  # of one device
    tokens_per_second: float  # image tokens of one device
    mfu: float | None  # share of the device's peak (flops.py)
    hfu: float | None
    data_stall: float  # share of the time that the host waited for batches
    communication: float | None  # share of a step's time; see Meter.communication
    memory: int  # bytes: most ever allocated on a GPU, resident on a CPU; of the worst rank
    lr: float  # of the last step, after warm-up and rules
    grad_norm: float | None  # before clipping, mean over the steps that were taken
    clipped: float | None  # share of those steps whose gradients were clipped
    skipped: int  # steps that were not finite
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Collects for one rank.

    clip_norm: what gradients are clipped to. peak: FLOP/s of the device (flops.peak_flops); without
    it no utilisation is given. group: whose ranks are added up, by default all of the initialised
    torch.distributed, and without that this process alone.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        clip_norm: float,
        num_timesteps: int = 1000,
        peak: float | None = None,
        group: dist.ProcessGroup | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if num_timesteps < QUARTERS:
            raise ConfigError(
                f"{num_timesteps} timesteps have no quarters; use at least {QUARTERS}"
            )
        self.device, self.clip_norm, self.num_timesteps = device, clip_norm, num_timesteps
        self.peak, self.group, self._clock = peak, group, clock
        self._terms: tuple[str, ...] = ()
        self._reset(clock())

    def _reset(self, now: float) -> None:
        self._since = now
        self._waited = self._images = self._tokens = 0.0
        self._model_flops: float | None = 0.0
        self._hardware_flops = 0.0
        self._communication = math.nan
        self._pending: Tensor | None = None  # of the step that is not decided yet
        rows = len(self._terms) + 1
        self._sums = torch.zeros(rows, QUARTERS, dtype=torch.float64, device=self.device)
        # steps taken, their norms added up, how many were clipped, steps skipped
        self._steps = torch.zeros(4, dtype=torch.float64, device=self.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that waits for the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, such as validation images: its time is not counted.

        Waits for the device first, so that steps still at work are.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self._clock()
        yield
        self._since += self._clock() - start

    def communication(self, share: float) -> None:
        """The part of a step's time in which the device only communicates, measured by the caller.

        Such is the time in which communication kernels run and no others, over all time, in a
        torch.profiler trace of one step (communication.exposed_share); communication hidden
        behind computation costs nothing and does not count. Nothing cheaper knows what overlaps.
        The next line, and only that, reports it.
        """
        self._communication = share

    @torch.no_grad()
    def micro_batch(
        self,
        losses: Mapping[str, Tensor],
        timesteps: Tensor,
        num_tokens: int,
        flops: StepFlops | None = None,
    ) -> None:
        """losses: terms by name, each [B], the same names every time; timesteps [B] integers.

        num_tokens and flops are of one image; without flops the line has no utilisation.
        """
        names = tuple(losses)
        if names != self._terms:
            if self._terms:
                raise ConfigError(f"losses {names} follow {self._terms}; a run has the same terms")
            if "loss" not in names:
                raise ConfigError(f"losses {names} have no `loss`, which is what is minimised")
            self._terms = names
            self._sums = self._sums.new_zeros(len(names) + 1, QUARTERS)
        quarter = timesteps * QUARTERS // self.num_timesteps
        mine = quarter[:, None] == torch.arange(QUARTERS, device=quarter.device)  # [B, 4]
        ones = torch.ones_like(quarter, dtype=torch.float64)
        values = torch.stack([*(each.detach().double() for each in losses.values()), ones])
        sums = torch.where(mine, values[..., None], 0.0).sum(1).to(self.device)
        self._pending = sums if self._pending is None else self._pending + sums
        count = len(timesteps)
        self._images += count
        self._tokens += count * num_tokens
        if flops is None:
            self._model_flops = None
        elif self._model_flops is not None:
            self._model_flops += count * flops.model
            self._hardware_flops += count * flops.hardware

    @torch.no_grad()
    def step(self, norm: Tensor, found_inf: Tensor) -> None:
        """What clip_gradients returned for this step, both []."""
        skip = found_inf > 0
        if self._pending is not None:
            self._sums += torch.where(skip, 0.0, self._pending)
            self._pending = None
        clipped = (norm > self.clip_norm).double()
        taken = torch.stack([torch.ones_like(clipped), norm.double(), clipped])
        self._steps[:3] += torch.where(skip, 0.0, taken)
        self._steps[3] += skip

    def line(self, step: int, lr: float) -> LogLine:
        """The line, and everything from zero. `step` steps are done, the last with rate lr."""
        rows = self._gather()
        now = self._clock()  # after the wait: the device has done what is counted
        line = self._summary(rows, now - self._since, step, lr)
        self._reset(now)
        return line

    def _gather(self) -> list[list[float]]:
        """Each rank's numbers, in the order in which _summary takes them apart."""
        flops = math.nan if self._model_flops is None else self._model_flops
        host = [
            self._images, self._tokens, self._waited, flops, self._hardware_flops,
            self._communication, float(memory_in_use(self.device)),
        ]  # fmt: skip
        numbers = torch.tensor(host, dtype=torch.float64).to(self.device)
        packed = torch.cat([numbers, self._steps, self._sums.flatten()])
        if not dist.is_initialized():
            return [packed.tolist()]
        everything = [torch.empty_like(packed) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everything, packed, group=self.group)
        return torch.stack(everything).tolist()

    def _summary(self, rows: list[list[float]], seconds: float, step: int, lr: float) -> LogLine:
        columns = list(zip(*rows, strict=True))
        images, tokens, waited, model, hardware, shares, memory = columns[:7]
        taken, norms, clipped, skipped = columns[7][0], columns[8][0], columns[9][0], columns[10][0]
        added = [math.fsum(column) for column in columns[11:]]
        *terms, counts = [added[at : at + QUARTERS] for at in range(0, len(added), QUARTERS)]
        device_seconds = len(rows) * seconds
        known = [share for share in shares if not math.isnan(share)]
        by_quarter = {
            name: tuple(map(_mean, sums, counts))
            for name, sums in zip(self._terms, terms, strict=True)
        }
        return LogLine(
            step=step,
            loss=_mean(sum(terms[self._terms.index("loss")]), sum(counts)) if terms else None,
            by_quarter=by_quarter,
            images_per_second=sum(images) / device_seconds,
            tokens_per_second=sum(tokens) / device_seconds,
            mfu=self._utilisation(model, device_seconds),
            hfu=self._utilisation(hardware, device_seconds) if _known(model) else None,
            data_stall=sum(waited) / device_seconds,
            communication=_mean(sum(known), len(known)),
            memory=int(max(memory)),
            lr=lr,
            grad_norm=_mean(norms, taken),
            clipped=_mean(clipped, taken),
            skipped=round(skipped),
            seconds=seconds,
        )

    def _utilisation(self, flops: Sequence[float], device_seconds: float) -> float | None:
        if self.peak is None or not _known(flops):
            return None
        return sum(flops) / device_seconds / self.peak


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that PyTorch ever allocated on a GPU, or what this process has resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _known(values: Sequence[float]) -> bool:
    return not any(math.isnan(value) for value in values)
