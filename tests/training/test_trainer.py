"""The loop: exact resumption, equal steps on any ranks, skipped steps, few compilations.

The runs are of small_run.py: three buckets, micro-batches of two samples, captions dropped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt.config import Precision
from pixart_rt.errors import CheckpointError, ConfigError, DataError, TrainingError
from pixart_rt.training.checkpoints import remove_checkpoints
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.replay import replay
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, RunSettings
from pixart_rt.training.sample_rng import draw

SCRIPT = Path(__file__).with_name("small_run.py")
spec = importlib.util.spec_from_file_location("small_run", SCRIPT)
assert spec is not None and spec.loader is not None
small_run = sys.modules["small_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_run)
digest, make_trainer = small_run.digest, small_run.make_trainer
STEPS = 7
LIMIT = 900  # seconds: of a run that hangs. A busy machine compiles blocks for minutes


@pytest.fixture
def ranks():
    with start_ranks("cpu") as ranks:
        yield ranks


def run(
    out: Path, *options: str, steps: int = STEPS, num_ranks: int = 1, nodes: int = 1,
    killed: bool = False,
) -> list[list[dict[str, Any]]]:  # fmt: skip
    """small_run.py on so many ranks; each rank's lines. `killed`: it must die of SIGKILL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = SCRIPT.parent.parent.parent
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks // nodes),
        "PYTHONPATH": str(root),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, out, str(steps), *options],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % (num_ranks // nodes))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        printed = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == (-signal.SIGKILL if killed else 0), errors
    return [[json.loads(line) for line in text.splitlines()] for text, _ in printed]


def steps_of(lines: list[list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """What was printed for each step, the ranks' samples one after the other; ends with digests."""
    found: dict[int, dict[str, Any]] = {}
    for rank in lines:
        for line in rank[:-1]:
            step = found.setdefault(line["step"], {"ids": [], "losses": [], "norm": line["norm"]})
            step["ids"] += line["ids"]
            step["losses"] += line["losses"]
            assert line["norm"] == step["norm"], "ranks disagree"
    digests = {rank[-1]["digest"] for rank in lines}
    assert len(digests) == 1, "ranks hold different weights"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one rank that nobody disturbed."""
    return run(tmp_path_factory.mktemp("alone"))


def test_the_first_step_is_what_autograd_and_adamw_make_of_the_mean_loss(ranks, tmp_path):
    """In float64, one big batch, against micro-batches in the trainer."""
    trainer = make_trainer(tmp_path, 1, ranks, clip_norm=0.1)
    trainer.objective.double()
    trainer.ema = None
    plain = small_run.make_objective().double()
    batch = trainer.feed(0, 1).__next__()
    result = trainer.step(batch)
    losses = plain(batch, draw(7, 0, batch))
    losses["loss"].mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=0.03).step()
    del losses["timesteps"]
    torch.testing.assert_close(result.losses, {n: v.detach() for n, v in losses.items()})
    torch.testing.assert_close(result.norm, norm, rtol=1e-9, atol=0)
    for (name, ours), theirs in zip(
        trainer.objective.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_the_loss_falls(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 18, ranks, lr=3e-3)
    losses = [trainer.step(batch).losses["mse"].mean().item() for batch in trainer.feed(0, 18)]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize("kill_at", [2, 5])
def test_a_killed_run_goes_on_bit_by_bit(alone, tmp_path, kill_at):
    run(tmp_path, "--kill-at", str(kill_at), killed=True)
    again = run(tmp_path)
    assert again[0][-1] == alone[0][-1]
    expected = steps_of(alone)
    for step, found in steps_of(again).items():
        assert found == expected[step]


@pytest.mark.slow
@pytest.mark.parametrize("parallel, num_ranks, nodes", [("ddp", 2, 1), ("fsdp", 2, 1),
                                                        ("hsdp", 4, 2)])  # fmt: skip
def test_ranks_share_the_steps_of_one(alone, tmp_path, parallel, num_ranks, nodes):
    shared = run(tmp_path, "--set", f"parallel={parallel}", num_ranks=num_ranks, nodes=nodes)
    expected, found = steps_of(alone), steps_of(shared)
    for step in range(STEPS):
        assert found[step]["ids"] == expected[step]["ids"]
        assert found[step]["losses"] == pytest.approx(expected[step]["losses"], rel=1e-5)
        assert found[step]["norm"] == pytest.approx(expected[step]["norm"], rel=1e-5)


@pytest.mark.slow
def test_a_reproducible_run_has_the_same_bits_on_one_two_and_four_ranks(tmp_path):
    """Also when it was killed on two ranks and resumed with four, or one."""
    option = ("--set", "reproducible=true")
    (one,) = run(tmp_path / "one", *option)
    killed = tmp_path / "killed"
    run(killed, *option, "--kill-at", "5", num_ranks=2, killed=True)
    four = run(killed, *option, num_ranks=4)
    assert {rank[-1]["digest"] for rank in four} == {one[-1]["digest"]}
    expected = steps_of([one])
    assert all(found == expected[step] for step, found in steps_of(four).items())


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_another_number_of_ranks(alone, tmp_path):
    """FSDP on two ranks, killed; then whole on one: the same state, cut anew."""
    run(tmp_path, "--set", "parallel=fsdp", "--kill-at", "5", num_ranks=2, killed=True)
    found, expected = steps_of(run(tmp_path)), steps_of(alone)
    assert set(found) and max(found) == STEPS - 1
    for step, values in found.items():
        assert values["ids"] == expected[step]["ids"]
        assert values["losses"] == pytest.approx(expected[step]["losses"], rel=1e-5)


@pytest.mark.slow
def test_the_same_sharded_ranks_go_on_bit_by_bit(tmp_path):
    option = ("--set", "parallel=fsdp", "optimizer=came")
    whole = run(tmp_path / "whole", *option, num_ranks=2)
    run(tmp_path / "killed", *option, "--kill-at", "4", num_ranks=2, killed=True)
    again = run(tmp_path / "killed", *option, num_ranks=2)
    assert again[0][-1] == whole[0][-1]


def test_an_unfinished_checkpoint_is_never_taken(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 3, ranks)
    trainer.run()
    good = trainer.checkpoints.path(3)
    unfinished = tmp_path / "checkpoints" / ".step-00000006"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    again = make_trainer(tmp_path, 7, ranks)
    again.resume()
    assert again.done == 3 and digest(again) == digest(trainer)
    again.run()
    assert again.checkpoints.steps() == [3, 6, 7] and not unfinished.exists() and good.exists()


def test_a_damaged_checkpoint_is_an_error_in_one_line(ranks, tmp_path):
    """One of a version that wrote no checksums: DCP itself finds out."""
    make_trainer(tmp_path, 3, ranks).run()
    progress = tmp_path / "checkpoints" / "step-00000003" / "progress.json"
    values = json.loads(progress.read_text())
    del values["files"]
    progress.write_text(json.dumps(values))
    for file in (tmp_path / "checkpoints" / "step-00000003").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        make_trainer(tmp_path, 7, ranks).resume()
    assert "\n" not in str(error.value)


def test_another_run_is_not_taken_up(ranks, tmp_path):
    make_trainer(tmp_path, 3, ranks).run()
    with pytest.raises(CheckpointError, match="seed 7, this run has 8"):
        make_trainer(tmp_path, 7, ranks, seed=8).resume()


@pytest.mark.parametrize("name", ["log.jsonl", "skipped.jsonl", "checkpoints"])
def test_files_that_are_not_a_runs_are_not_rewritten(ranks, tmp_path, name):
    (tmp_path / name).write_text('{"step": 99}\n')
    with pytest.raises(ConfigError, match=f"holds {name}, but not of a run"):
        make_trainer(tmp_path, 3, ranks).run()
    assert (tmp_path / name).read_text() == '{"step": 99}\n'


def test_only_checkpoints_are_removed_with_them(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000003", ".step-00000006", ".step-00000001-gone", "step-best", "mine"):
        (folder / name).mkdir(parents=True)
    remove_checkpoints(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "step-best"]


def test_two_runs_do_not_share_a_folder(ranks, tmp_path):
    second = make_trainer(tmp_path, 3, ranks)

    def feed(start, stop):
        with pytest.raises(ConfigError, match="written to by another run; wait"):
            second.run()
        return first_feed(start, stop)

    first = make_trainer(tmp_path, 3, ranks)
    first_feed, first.feed = first.feed, feed
    first.run()
    assert first.done == 3 and second.done == 0
    second.run()  # the folder is free again
    assert second.done == 3


def test_old_checkpoints_are_removed(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 7, ranks, save_every=1, keep=2)
    trainer.run()
    assert trainer.checkpoints.steps() == [6, 7]


@pytest.mark.parametrize("how", ["changed", "shortened", "removed", "no progress"])
def test_a_damaged_checkpoint_is_passed_over(ranks, tmp_path, how, caplog):
    """One bit of a tensor too: what it would load is silently another model."""
    trainer = make_trainer(tmp_path, 7, ranks)
    trainer.run()
    assert trainer.checkpoints.steps() == [3, 6, 7]
    newest = trainer.checkpoints.path(7)
    files = trainer.checkpoints.progress(7).files
    assert set(files) == {path.name for path in newest.iterdir()} - {"progress.json"}
    data = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if how == "changed":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "shortened":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "removed":
        data.unlink()
    else:
        (newest / "progress.json").write_text("{")
    again = make_trainer(tmp_path, 7, ranks)
    again.resume()
    assert again.done == 6
    assert "step-00000007 is damaged" in caplog.text and "resuming from step 6" in caplog.text
    again.run()
    assert digest(again) == digest(trainer)
    assert not again.checkpoints.damage(7)


def test_nothing_is_begun_anew_over_damaged_checkpoints(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 3, ranks)
    trainer.run()
    (trainer.checkpoints.path(3) / "progress.json").unlink()
    with pytest.raises(CheckpointError, match="nothing is left to resume from"):
        make_trainer(tmp_path, 5, ranks).run()
    assert trainer.checkpoints.steps() == [3]


def test_a_run_that_only_skips_steps_ends_with_one_line(ranks, tmp_path, monkeypatch):
    """With a rate of 1e30 the first step is finite and none after it."""
    trainer = make_trainer(tmp_path / "end", 5, ranks, lr=1e30, log_every=5)
    with pytest.raises(
        TrainingError, match=r"the last 4 of 5 steps .* lower lr \(1e\+30\)"
    ) as found:
        trainer.run()
    assert "\n" not in str(found.value) and trainer.skipped.item() == 4
    monkeypatch.setattr("pixart_rt.training.trainer.SKIPPED_IN_A_ROW", 3)
    early = make_trainer(tmp_path / "early", 100, ranks, lr=1e30, log_every=2)
    with pytest.raises(TrainingError, match="the last 3 of 4 steps"):
        early.run()


@pytest.mark.parametrize("optimizer", [OptimizerKind.ADAMW, OptimizerKind.CAME])
def test_a_step_that_is_not_finite_changes_nothing(ranks, tmp_path, optimizer):
    trainer = make_trainer(tmp_path, 4, ranks, poisoned=2, optimizer=optimizer)
    before = after = None
    for batch in trainer.feed(0, 4):
        at = trainer.done
        if at == 2:
            before = [each.detach().clone() for each in trainer.parameters]
        result = trainer.step(batch)
        assert result.found_inf.item() == (at == 2)
        if at == 2:
            after = [each.detach().clone() for each in trainer.parameters]
    assert trainer.skipped.item() == 1 and before is not None and after is not None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(each).all() for each in trainer.parameters)


def test_float16_steps_are_scaled_and_a_large_scale_is_found(ranks, tmp_path):
    """The scale falls until gradients are finite; the steps are then near those of float32."""
    trainer = make_trainer(tmp_path, 9, ranks, precision=Precision.FP16)
    plain = make_trainer(tmp_path / "plain", 9, ranks)
    trainer.loss_scale.scale.fill_(2.0**30)
    batch = next(trainer.feed(0, 1))
    result = trainer.step(batch)
    assert result.found_inf.item() == 1 and trainer.loss_scale.scale.item() == 2.0**29
    trainer.loss_scale.scale.fill_(2.0**12)
    trainer.done = 0
    found, expected = trainer.step(batch), plain.step(batch)
    assert found.found_inf.item() == 0
    torch.testing.assert_close(found.norm, expected.norm, rtol=0.01, atol=0)


@pytest.mark.parametrize("checkpointing", [Checkpointing.SELECTIVE, Checkpointing.FULL])
def test_checkpointed_activations_change_no_bit(ranks, tmp_path, checkpointing):
    kept = make_trainer(tmp_path / "a", 2, ranks)
    again = make_trainer(tmp_path / "b", 2, ranks, checkpointing=checkpointing)
    for trainer in (kept, again):
        trainer.run()
    assert digest(kept) == digest(again)


@pytest.mark.slow
def test_compiled_blocks_can_be_sharded(alone, tmp_path):
    """Three steps are one of each bucket: compilation is nearly all of the time."""
    options = ("--set", "parallel=fsdp", "compile=true", "checkpointing=selective")
    found, expected = steps_of(run(tmp_path, *options, steps=3, num_ranks=2)), steps_of(alone)
    assert len(found) == 3
    for step in found:
        assert found[step]["losses"] == pytest.approx(expected[step]["losses"], rel=1e-4)


def test_a_run_with_fewer_steps_or_another_rate_is_refused(ranks, tmp_path):
    make_trainer(tmp_path, 3, ranks).run()
    with pytest.raises(CheckpointError, match="2 steps were requested"):
        make_trainer(tmp_path, 2, ranks).resume()
    with pytest.raises(CheckpointError, match=r"lr 0\.001, this run has 0\.002"):
        make_trainer(tmp_path, 5, ranks, lr=2e-3).resume()


def test_a_failing_run_keeps_the_checkpoint_in_flight(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 9, ranks)
    batches = list(trainer.feed(0, 3))

    def broken(start: int, stop: int):
        yield from batches
        raise DataError("a damaged sample")

    trainer.feed = broken
    with pytest.raises(DataError, match="damaged"):
        trainer.run()
    assert trainer.checkpoints.steps() == [3]


def test_skipped_steps_that_are_taken_again_are_written_down_once(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 5, ranks, poisoned=3)
    trainer.run()
    shutil.rmtree(trainer.checkpoints.path(5))
    again = make_trainer(tmp_path, 5, ranks, poisoned=3)
    again.run()
    assert again.skipped.item() == 1
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_blocks_are_compiled_at_most_twice_over_all_buckets(ranks, tmp_path):
    """A block inside and the last block, for every bucket; near the steps that are not compiled."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    compiled = make_trainer(tmp_path / "a", STEPS, ranks, compile=True)
    plain = make_trainer(tmp_path / "b", STEPS, ranks)
    seen = set()
    for batch in plain.feed(0, STEPS):
        found, expected = compiled.step(batch), plain.step(batch)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
        seen.add(batch.bucket)
    assert len(seen) == len(small_run.BUCKETS)
    assert counted["unique_graphs"] - before <= 2
    torch._dynamo.reset()


def test_the_rate_follows_the_warmup(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 4, ranks, warmup=Warmup(steps=3))
    rates = [trainer.step(batch).lr for batch in trainer.feed(0, 4)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


@pytest.mark.parametrize("changed", [
    {"steps": 0}, {"lr": 0.0}, {"micro_batches": 0}, {"seed": -1}, {"validate_every": 0},
    {"reproducible": True, "parallel": Parallel.FSDP}, {"reproducible": True, "micro_batches": 6},
])  # fmt: skip
def test_impossible_settings_are_refused(changed):
    with pytest.raises(ConfigError):
        RunSettings(**{"steps": 1, "lr": 1.0, **changed})


def test_a_batch_that_does_not_divide_is_refused(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 1, ranks, micro_batches=3)
    with pytest.raises(ConfigError, match="does not divide into 3"):
        trainer.step(next(trainer.feed(0, 1)))


def test_every_sample_trains_with_its_own_draws(ranks, tmp_path):
    """The draws of a sample do not depend on its neighbours, and differ from step to step."""
    batch = next(make_trainer(tmp_path, 1, ranks).feed(0, 1))
    whole, part = draw(0, 3, batch), draw(0, 3, batch.rows(2, 5))
    assert torch.equal(whole.noise[2:5], part.noise)
    assert torch.equal(whole.uniform[2:5], part.uniform)
    assert not torch.equal(whole.noise, draw(0, 4, batch).noise)


def test_skipped_samples_are_written_down_and_the_step_runs_again(ranks, tmp_path, caplog):
    trainer = make_trainer(tmp_path, 5, ranks, poisoned=4)
    trainer.run()
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 4 and "--replay 4" in caplog.text
    again = make_trainer(tmp_path, 5, ranks, poisoned=4)
    report = replay(again, 4)
    assert report["from_checkpoint"] == 3 and not report["finite"]
    (mine,) = report["ranks"]
    assert mine["ids"] == record["ids"] == trainer.feed.batch(4).ids.tolist()
    bad = [not math.isfinite(loss) for loss in mine["loss"]]
    assert bad == [True] + [False] * 7  # the sample that small_run poisons
    assert mine["first_output_not_finite"] == "model.x_embedder"
    assert "model.blocks.0.attn.qkv.weight" in mine["gradients_not_finite"]


def test_a_replayed_step_is_the_one_that_was(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 6, ranks, save_every=2)
    batches = trainer.feed(0, 6)
    results = [trainer.step(next(batches)) for _ in range(2)]
    trainer.save()
    results += [trainer.step(batch) for batch in batches]
    trainer.checkpoints.finish()
    report = replay(make_trainer(tmp_path, 6, ranks), 4)
    assert report["from_checkpoint"] == 2 and report["finite"]
    assert report["norm"] == results[4].norm.item()
    assert report["ranks"][0]["loss"] == results[4].losses["loss"].tolist()


def test_the_log_counts_what_the_steps_did(ranks, tmp_path):
    trainer = make_trainer(tmp_path, 5, ranks, log_every=2)
    seen = []
    trainer.observe = lambda result, batch: seen.append((result, batch))
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 5], "also before a checkpoint"
    for line, (first, last) in zip(lines, ((0, 2), (2, 3), (3, 4), (4, 5)), strict=True):
        losses = torch.cat([result.losses["loss"] for result, _ in seen[first:last]])
        assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
        assert line["skipped"] == 0 and line["lr"] == 1e-3 and line["mfu"] is None
        norms = [result.norm.item() for result, _ in seen[first:last]]
        assert line["grad_norm"] == pytest.approx(sum(norms) / len(norms))


def test_profiling_needs_a_gpu_and_a_log_line_to_report_it(ranks, tmp_path):
    with pytest.raises(ConfigError, match="profile_every was requested on cpu"):
        make_trainer(tmp_path, 4, ranks, profile_every=2)
    with pytest.raises(
        ConfigError, match="profile_every 3 is not supported with a log line every 2"
    ):
        small_run.make_settings(4, profile_every=3, log_every=2)
    with pytest.raises(ConfigError, match="profile_every must be > 0"):
        small_run.make_settings(4, profile_every=0)


@pytest.mark.gpu
def test_a_profiled_step_reports_its_communication(tmp_path):
    """Alone there is none; lines of steps that were not profiled say nothing."""
    with start_ranks("cuda") as ranks:
        make_trainer(tmp_path, 6, ranks, log_every=2, profile_every=4, save_every=6).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["communication"] for line in lines}
    assert found.pop(4) == 0.0 and set(found.values()) == {None}


def test_profiled_steps_are_those_before_a_log_line(ranks, tmp_path, monkeypatch):
    """With a profiler that is made up: it needs a GPU."""
    profiled = []

    @contextmanager
    def made_up(device, report):
        start = trainer.done
        yield
        profiled.append((start, trainer.done))
        report(0.25)

    monkeypatch.setattr("pixart_rt.training.trainer.profiled", made_up)
    trainer = make_trainer(tmp_path, 7, ranks, save_every=7)
    trainer.settings = dataclasses.replace(trainer.settings, profile_every=4)
    trainer.run()
    assert profiled == [(3, 4)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["communication"] for line in lines}
    assert found.pop(4) == 0.25 and set(found.values()) == {None}
