"""Log lines in every place: whole, once, and only from rank 0."""

from __future__ import annotations

import builtins
import io
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from pixart_rt.errors import BackendError, DataError
from pixart_rt.training.log_writers import (
    JSONL,
    ConsoleWriter,
    JsonlWriter,
    Place,
    describe,
    open_log,
    read_lines,
    scalars,
)
from pixart_rt.training.metrics import LogLine

LINE = LogLine(
    step=10, loss=0.5, by_quarter={"loss": (0.1, None, 0.25, 1.0), "mse": (1.0, 2.0, 3.0, 4.0)},
    images_per_second=123.456, tokens_per_second=31604.7, mfu=0.4616, hfu=0.5, data_stall=0.015,
    communication=None, memory=38_200_000_000, lr=2e-5, grad_norm=0.31, clipped=0.25, skipped=0,
    seconds=2.5,
)  # fmt: skip


def at(step, loss=0.5):
    return replace(LINE, step=step, loss=loss)


def steps(path):
    return [record["step"] for record in read_lines(path)]


def test_the_console_line_says_what_is_known():
    assert describe(LINE, 200) == (
        "step 10/200  loss 0.5 (0.1 - 0.25 1)  123.5 img/s  3.16e+04 tokens/s  MFU 46.2 %  "
        "HFU 50.0 %  waits for data 1.5 %  clipped 25.0 %  38.20 GB  lr 2e-05  norm 0.31"
    )
    unknown = replace(LINE, loss=None, by_quarter={}, mfu=None, hfu=None, grad_norm=None,
                      clipped=None, communication=0.1, skipped=3)  # fmt: skip
    assert describe(unknown) == (
        "step 10  loss -  123.5 img/s  3.16e+04 tokens/s  waits for data 1.5 %  "
        "communication 10.0 %  38.20 GB  lr 2e-05  norm -  skipped 3"
    )
    shown = io.StringIO()
    ConsoleWriter(200, Console(file=shown, width=20, highlight=False)).write(LINE)
    assert shown.getvalue() == describe(LINE, 200) + "\n"


def test_the_file_has_a_line_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = JsonlWriter(path)
    writer.write(LINE)
    (record,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert record.pop("time").endswith("+00:00")
    assert record == json.loads(json.dumps(LINE.to_dict()))
    writer.write(replace(LINE, loss=math.nan, by_quarter={"loss": (math.inf, 1.0)}))
    writer.close()
    second = read_lines(path)[1]
    assert (second["loss"], second["by_quarter"]) == (None, {"loss": [None, 1.0]})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


@pytest.mark.parametrize(
    ("start", "left"), [(0, []), (19, [10]), (20, [10, 20]), (99, [10, 20, 30])]
)
def test_a_resumed_run_is_logged_once(tmp_path, start, left):
    with open_log([Place.JSONL], tmp_path) as log:
        for step in (10, 20, 30):
            log.write(at(step))
    path = tmp_path / JSONL
    path.write_text(path.read_text() + '{"time": "2026-11-21T1')  # killed while writing
    with open_log([Place.JSONL], tmp_path, start=start) as log:
        assert steps(path) == left
        log.write(at(start + 5, loss=9.0))
    assert steps(path) == [*left, start + 5]
    assert read_lines(path)[-1]["loss"] == 9.0
    assert [each.name for each in tmp_path.iterdir()] == [JSONL]


def test_a_damaged_file_is_left_as_it_is(tmp_path):
    for text in ('{"step": 1}\nrubbish\n{"step": 3}\n', '{"loss": 1}\n', "[1]\n"):
        (tmp_path / JSONL).write_text(text)
        with pytest.raises(DataError, match=r"log\.jsonl line \d is no log line .*move the file"):
            JsonlWriter(tmp_path / JSONL, 5)
        assert (tmp_path / JSONL).read_text() == text


def test_only_rank_0_writes(tmp_path):
    with open_log(set(Place) - {Place.WANDB}, tmp_path / "one", rank=1) as log:
        log.write(LINE)
    assert log.writers == () and not (tmp_path / "one").exists()


def test_a_run_that_fails_closes_its_log(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        open_log([Place.JSONL], tmp_path) as log,
    ):
        log.write(LINE)
        raise ZeroDivisionError
    assert steps(tmp_path / JSONL) == [10]
    with pytest.raises(ValueError, match="closed file"):
        log.write(LINE)


def test_scalars_are_what_is_known():
    found = scalars(LINE)
    assert found["loss"] == 0.5 and found["mse/quarter-4"] == 4.0
    assert "loss/quarter-2" not in found and "communication" not in found
    assert "step" not in found and all(isinstance(each, float) for each in found.values())
    assert len(found) == 3 + 4 + 12


def test_tensorboard_reads_the_events(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    with open_log([Place.TENSORBOARD], tmp_path) as log:
        for step in (10, 20, 30):
            log.write(at(step, loss=step / 10))
    with open_log([Place.TENSORBOARD], tmp_path, start=20) as log:
        log.write(at(30, loss=7.0))
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(LINE))
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 2.0), (30, 7.0)]


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    """Its package is not installed here; this stands for it and keeps what it is told."""
    calls = []

    def init(**settings):
        calls.append(settings)
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 10):
        with open_log([Place.WANDB], tmp_path, start=start, settings={"lr": 1}) as log:
            log.write(LINE)
    first, second = calls[:3], calls[3:]
    assert first == second and first[0]["id"] and first[0]["resume"] == "allow"
    assert first[0]["config"] == {"lr": 1} and first[1:] == [(10, scalars(LINE)), "finish"]


@pytest.mark.parametrize(
    ("place", "package", "words"),
    [
        (Place.WANDB, "wandb", "wandb was requested, .* pip install wandb"),
        (Place.TENSORBOARD, "torch.utils.tensorboard", r"pixart_rt\[tensorboard\]"),
    ],
)
def test_a_missing_package_is_said(tmp_path, monkeypatch, place, package, words):
    real = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=words), open_log([place], tmp_path):
        pass
