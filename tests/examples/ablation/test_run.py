"""The ablation from end to end at toy size: what is written, and that a stopped one resumes."""

from __future__ import annotations

import json

import pytest

from examples.ablation import run as run_file
from examples.ablation.arms import Arm, Plan, planned, steps_within
from examples.ablation.report import CLAIMS, at, table, write
from examples.ablation.run import Ablation, Curve, Point
from examples.ablation.shapes import Cost
from pixart_rt.errors import ConfigError
from pixart_rt.training.process_group import start_ranks

PLAN = Plan(
    steps=2, points=2, resolution=64, batch=2, num_scenes=4, captions=2, sampling_steps=2,
    num_layers=1, precision="fp32", ema_decay=0.1,  # or two steps would not show in the average
)  # fmt: skip


@pytest.fixture
def ranks():
    with start_ranks("cpu") as ranks:
        yield ranks


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(run_file, "UNSEEN", 4)


class Stop(Exception):
    """What stops a run here."""


def stop_at(arm):
    def progress(name, done, total):
        if name == f"training {arm}":
            raise Stop

    return progress


def test_all_arms_and_on_after_a_stop(ranks, tmp_path):
    whole = Ablation(PLAN, tmp_path / "whole", ranks).run()
    parts = tmp_path / "parts"
    for arm in (Arm.ADALN, Arm.SCRATCH):
        with pytest.raises(Stop):
            Ablation(PLAN, parts, ranks, stop_at(arm)).run()
    (parts / "sparse" / "scores" / "step-00000001.json").unlink()  # killed before it was scored
    again = Ablation(PLAN, parts, ranks).run()
    for arm in Arm:
        assert again[arm].losses == whole[arm].losses and again[arm].points == whole[arm].points
        steps = [point.step for point in whole[arm].points]
        assert steps == ([] if arm is Arm.DIT else [1, 2, 3, 4][: arm.length * PLAN.points])
    assert len({tuple(curve.losses) for curve in whole.values()}) == len(Arm)
    ends = [curve.points[-1].loss for arm, curve in whole.items() if arm is not Arm.DIT]
    assert len(set(ends)) == len(Arm) - 1


def curves():
    """Losses and scores that name their arm and step."""
    found = {}
    for number, arm in enumerate(Arm):
        steps = range(1, arm.length * PLAN.steps + 1)
        points = [Point(step, 100 * number + step, number / 10, step / 100, 0.0) for step in steps]
        losses = [(step, number + step / 10) for step in steps]
        found[arm] = Curve(losses, [] if arm is Arm.DIT else points, 1.0)
    return found


COSTS = {"adaln": Cost(parameters=3_000_000, parameters_xl=4, peak_bytes=5 * 2**20)}


def test_the_table_compares_equal_budgets():
    rows = [line.split(" | ") for line in table(PLAN, curves(), COSTS) if line.startswith("| ")]
    found = {(row[0].strip("| "), row[1]): row[2:] for row in rows[1:9]}
    single = found["Decomposed against single-stage training", "text at once"]
    both = found["Decomposed against single-stage training", "classes, then text"]
    assert single[:3] == ["4", "8", "404.0000"] and both[:3] == ["2", "8", "102.0000"]
    scratch = found["Re-parameterised against from scratch", "from scratch"]
    assert scratch[:4] == ["2", "4", "402.0000", "40.0%"] and scratch[4] == "2.0%"
    assert rows[-1][1:3] == ["3.00 M", "0.0 M"] and rows[-1][3].startswith("5 MiB")
    assert at(curves()[Arm.SPARSE], 2) == Point(2, 302, 0.3, 0.02, 0.0)


def test_everything_is_written(tmp_path):
    written = write(tmp_path, PLAN, curves(), COSTS, {"commit": "abc"})
    pictures = [f"ablation-{claim.name}.png" for claim in CLAIMS]
    assert [path.name for path in written] == ["ablation.md", "ablation.json", *pictures]
    assert all(path.stat().st_size > 300 for path in written)
    values = json.loads(written[1].read_text())
    assert values["commit"] == "abc" and Plan.from_dict(values["plan"]) == PLAN
    assert values["arms"]["scratch"]["points"][-1]["step"] == 4


def test_a_folder_keeps_its_plan(tmp_path):
    first = planned(tmp_path, {"batch": 3}, lambda known: 8)
    assert (first.steps, first.batch) == (8, 3)
    assert planned(tmp_path, {}, lambda known: 100) == first
    with pytest.raises(ConfigError, match=r"batch 4 was requested, but the ablation in .* has 3"):
        planned(tmp_path, {"batch": 4}, lambda known: 8)


def test_steps_of_a_time():
    assert steps_within(600, 0.5, 4) == 148  # 0.75 * 600 / 0.5 / 6 = 150, in four equal parts
    assert steps_within(1, 10, 4) == 4


@pytest.mark.parametrize("changed", [{"steps": 3}, {"resolution": 100}, {"batch": 0}])
def test_impossible_plans_are_refused(changed):
    with pytest.raises(ConfigError):
        Plan(**{"steps": 4, **changed})
