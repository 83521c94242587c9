"""The meter against plain arithmetic, with a clock that the test moves."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_rt.errors import ConfigError
from pixart_rt.training.communication import Span, device_spans, exposed_share
from pixart_rt.training.flops import StepFlops
from pixart_rt.training.metrics import Meter, memory_in_use
from pixart_rt.training.process_group import start_ranks

CPU = torch.device("cpu")
FLOPS = StepFlops(forward=100, backward=200, recomputed=90)


class Clock:
    now = 5.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return Meter(CPU, clip_norm=1.0, peak=1e4, clock=clock)


def tensors(*values):
    return tuple(torch.tensor(value) for value in values)


class Waits(TorchDispatchMode):
    """Counts operators that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_losses_by_quarter_are_plain_means(meter, clock):
    """Random losses over eleven steps of one to three micro-batches, two steps skipped."""
    rng = np.random.default_rng(0)
    kept = []  # (timestep, loss, mse, vb)
    norms, images, tokens = [], 0, 0
    with Waits() as waits:
        for step in range(11):
            skip, rows = step in (3, 8), []
            for _ in range(1 + step % 3):
                count = int(rng.integers(1, 6))
                t = rng.integers(0, 1000, count)
                mse, vb = rng.random((2, count), np.float32)
                if skip:
                    mse[0] = math.nan
                terms = {"loss": mse + vb, "mse": mse, "vb": vb}
                losses = {name: torch.from_numpy(value) for name, value in terms.items()}
                meter.micro_batch(losses, torch.from_numpy(t), 37, FLOPS)
                rows += zip(t, mse + vb, mse, vb, strict=True)
                images, tokens = images + count, tokens + 37 * count
            norm = math.nan if skip else float(rng.random() * 2)
            meter.step(*tensors(norm, float(skip)))
            if not skip:
                kept += rows
                norms.append(norm)
    assert waits.count == 0
    clock.now += 4.0
    line = meter.line(11, 2e-5)
    table = np.array(kept, np.float64)
    assert line.loss == pytest.approx(table[:, 1].mean(), rel=1e-6)
    for column, name in enumerate(("loss", "mse", "vb"), start=1):
        for quarter in range(4):
            inside = (table[:, 0] >= 250 * quarter) & (table[:, 0] < 250 * (quarter + 1))
            mean = table[inside, column].mean()
            assert line.by_quarter[name][quarter] == pytest.approx(mean, rel=1e-6)
    assert line.grad_norm == pytest.approx(np.mean(norms), rel=1e-6)
    assert line.clipped == np.mean([norm > 1 for norm in norms])
    assert 0 < line.clipped < 1
    assert (line.skipped, line.step, line.lr, line.seconds) == (2, 11, 2e-5, 4.0)
    assert line.images_per_second == images / 4
    assert line.tokens_per_second == tokens / 4
    assert line.mfu == pytest.approx(images * 300 / 4 / 1e4)
    assert line.hfu == pytest.approx(images * 390 / 4 / 1e4)


def test_the_edges_of_the_quarters(meter, clock):
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    meter.micro_batch({"loss": torch.arange(8.0)}, t, 1)
    meter.step(*tensors(0.5, 0.0))
    clock.now += 1
    assert meter.line(1, 0.1).by_quarter == {"loss": (0.5, 2.5, 4.5, 6.5)}
    few = Meter(CPU, clip_norm=1.0, num_timesteps=50)
    few.micro_batch({"loss": torch.tensor([1.0, 3.0, 5.0])}, torch.tensor([12, 13, 49]), 1)
    few.step(*tensors(0.5, 0.0))
    assert few.line(1, 0.1).by_quarter == {"loss": (1.0, 3.0, None, 5.0)}


def test_a_line_starts_from_zero(meter, clock):
    for value in (4.0, 8.0):
        meter.micro_batch({"loss": torch.tensor([value])}, torch.tensor([3]), 7, FLOPS)
        meter.step(*tensors(3.0, 0.0))
        meter.communication(0.25)
        clock.now += 2
        line = meter.line(1, 0.1)
        assert (line.loss, line.seconds, line.images_per_second) == (value, 2.0, 0.5)
        assert (line.clipped, line.communication) == (1.0, 0.25)
    clock.now += 1
    empty = meter.line(2, 0.1)
    assert (empty.loss, empty.grad_norm, empty.clipped, empty.communication) == (None,) * 4
    assert empty.by_quarter == {"loss": (None,) * 4}
    assert (empty.images_per_second, empty.mfu, empty.skipped) == (0.0, 0.0, 0)
    json.dumps(empty.to_dict(), allow_nan=False)


def test_only_skipped_steps(meter, clock):
    meter.micro_batch({"loss": torch.tensor([math.nan])}, torch.tensor([3]), 7)
    meter.step(*tensors(math.inf, 1.0))
    clock.now += 1
    line = meter.line(1, 0.1)
    assert (line.loss, line.grad_norm, line.clipped, line.skipped) == (None, None, None, 1)
    assert line.images_per_second == 1


def test_waiting_and_pauses(meter, clock):
    for seconds in (0.5, 1.5):
        with meter.waiting():
            clock.now += seconds
        clock.now += 3
        with meter.paused():
            clock.now += 100
    line = meter.line(1, 0.1)
    assert line.seconds == 8.0
    assert line.data_stall == 0.25


def test_utilisation_is_known_or_none(clock):
    without_peak = Meter(CPU, clip_norm=1.0, clock=clock)
    without_flops = Meter(CPU, clip_norm=1.0, peak=1e4, clock=clock)
    for meter, given in ((without_peak, [FLOPS]), (without_flops, [FLOPS, None, FLOPS])):
        for flops in given:
            meter.micro_batch({"loss": torch.ones(2)}, torch.tensor([3, 4]), 7, flops)
            meter.step(*tensors(1.0, 0.0))
        clock.now += 1
        line = meter.line(1, 0.1)
        assert (line.mfu, line.hfu) == (None, None)


def test_sums_do_not_lose_small_losses(meter, clock):
    """A float32 sum of 2e5 equal losses is off by more than the mean's own last digits."""
    loss = torch.full((20000,), 0.1)
    for _ in range(10):
        meter.micro_batch({"loss": loss}, torch.zeros(20000, dtype=torch.int64), 1)
        meter.step(*tensors(1.0, 0.0))
    clock.now += 1
    assert meter.line(10, 0.1).loss == pytest.approx(float(loss[0]), rel=1e-12)


def test_memory_is_what_the_process_has(meter, clock):
    clock.now += 1
    assert 1e7 < memory_in_use(CPU) < 1e12
    assert 1e7 < meter.line(1, 0.1).memory < 1e12


def test_what_cannot_be_is_said(meter):
    meter.micro_batch({"loss": torch.ones(1)}, torch.tensor([3]), 7)
    with pytest.raises(ConfigError, match=r"losses \('mse',\) follow \('loss',\)"):
        meter.micro_batch({"mse": torch.ones(1)}, torch.tensor([3]), 7)
    with pytest.raises(ConfigError, match=r"\('vb',\) have no `loss`"):
        Meter(CPU, clip_norm=1.0).micro_batch({"vb": torch.ones(1)}, torch.tensor([3]), 7)
    with pytest.raises(ConfigError, match="3 timesteps have no quarters"):
        Meter(CPU, clip_norm=1.0, num_timesteps=3)


def test_a_line_of_the_trainer_is_of_its_results(tmp_path):
    """Four steps of the small run, one of them poisoned; the results themselves are the oracle."""
    spec = importlib.util.spec_from_file_location(
        "small_run", Path(__file__).with_name("small_run.py")
    )
    small_run = sys.modules["small_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_run)
    results, batches = [], []

    with start_ranks("cpu") as ranks:
        trainer = small_run.make_trainer(tmp_path, 4, ranks, poisoned=2)
        for batch in trainer.feed(0, 4):
            results.append(trainer.step(batch))
            batches.append(batch)
        line = trainer.meter.line(trainer.done, results[-1].lr)
    taken = [result for result in results if not result.found_inf]
    losses = torch.cat([result.losses["loss"] for result in taken])
    assert len(taken) == 3 and line.skipped == 1
    assert line.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert set(line.by_quarter) == set(taken[0].losses)
    norms = torch.stack([result.norm for result in taken])
    assert line.grad_norm == pytest.approx(norms.mean().item(), rel=1e-5)
    assert line.images_per_second * line.seconds == pytest.approx(sum(map(len, batches)))
    tokens = sum(len(batch) * batch.bucket.num_tokens for batch in batches)
    assert line.tokens_per_second * line.seconds == pytest.approx(tokens)
    assert (line.mfu, line.step, line.lr) == (None, 4, 1e-3)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    device = torch.device("cuda")
    meter = Meter(device, clip_norm=1.0)
    losses, t = {"loss": torch.rand(8, device=device)}, torch.randint(1000, (8,), device=device)
    norm, found_inf = torch.ones((), device=device), torch.zeros((), device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.micro_batch(losses, t, 7, FLOPS)
            meter.step(norm, found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.line(3, 0.1).loss == pytest.approx(float(losses["loss"].mean()), rel=1e-6)


RANK = """
import sys

import torch
import torch.distributed as dist

from pixart_rt.training.flops import StepFlops
from pixart_rt.training.metrics import Meter

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
now = [0.0]
meter = Meter(torch.device("cpu"), clip_norm=1.0, peak=100.0, clock=lambda: now[0])
for step in range(2):
    with meter.waiting():
        now[0] += rank
    t = torch.tensor([10, 900])[: 2 - rank]
    losses = {"loss": torch.tensor([1.0, 2.0])[: 2 - rank] + 10 * rank}
    meter.micro_batch(losses, t, 5, StepFlops(forward=100, backward=0))
    meter.step(torch.tensor(2.0), torch.tensor(0.0))
now[0] = 4.0
line = meter.line(2, 0.1)
print([line.loss, line.by_quarter, line.images_per_second, line.tokens_per_second, line.mfu,
       line.data_stall, line.grad_norm, line.clipped, line.skipped])
dist.destroy_process_group()
"""


def test_two_ranks_are_added_up(tmp_path):
    """Rank 0: two images a step, losses 1 and 2. Rank 1: one, loss 11; waits 2 of 4 seconds."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    lines = []
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        lines.append(out.splitlines()[-1])
    expected = [14 / 3, {"loss": (6.0, None, None, 2.0)}, 6 / 8, 30 / 8, 600 / 8 / 100, 2 / 8,
                2.0, 1.0, 0]  # fmt: skip
    assert lines == [str(expected)] * 2


def test_only_communication_that_nothing_hides_counts():
    spans = [
        Span(0, 10, False),
        Span(5, 12, True),  # 2 alone
        Span(11, 14, True),  # 2 more; the first second is counted already
        Span(20, 25, False),
        Span(21, 22, True),  # hidden
        Span(30, 40, True),  # 6 alone: a kernel computes from 34 to 38
        Span(34, 38, False),
    ]
    assert exposed_share(spans) == pytest.approx((2 + 2 + 6) / 40)
    assert exposed_share(spans[::-1]) == exposed_share(spans)
    assert exposed_share([]) == 0
    assert exposed_share([Span(3, 4, True)]) == 1
    assert exposed_share([Span(3, 4, False)]) == 0


def test_a_trace_of_a_cpu_has_no_kernels():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.randn(8, 8) @ torch.randn(8, 8)
    assert len(trace.events()) and device_spans(trace) == []
