"""The record of a result file, and the file: whole after every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pixart_rt.bench import provenance as module
from pixart_rt.bench.charts import colors_of
from pixart_rt.bench.provenance import COMMAND, COMMIT, ResultFile, command_line, provenance


def test_a_script_names_its_own_command_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.delenv(COMMIT, raising=False)
    monkeypatch.setattr(module, "_commit", lambda: "of the checkout")
    found = provenance("given")
    assert (found["command"], found["commit"]) == ("given", "of the checkout")
    assert len(found["hardware"]["load_average_at_end"]) == 3
    monkeypatch.setenv(COMMAND, "run.sh check")
    monkeypatch.setenv(COMMIT, "abc")
    found = provenance("given")
    assert (found["command"], found["commit"]) == ("run.sh check", "abc")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("benchmarks.model", "python -m benchmarks.model --forms 'ours fused'"),
        ("pixart_rt.__main__", "pixart-rt --forms 'ours fused'"),
        (None, "pixart-rt --forms 'ours fused'"),
    ],
)
def test_the_command_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, name: str | None, said: str
) -> None:
    spec = None if name is None else SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["/somewhere/pixart-rt", "--forms", "ours fused"])
    assert command_line() == said


def test_a_file_is_whole_after_every_row_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save = ResultFile(path)
    assert save.earlier("rows") == [] and not path.exists()
    for count in (1, 2):
        save({"rows": list(range(count))})
        found = json.loads(path.read_text())
        assert found["rows"] == list(range(count)) and found["versions"]["torch"]
    assert ResultFile(path).earlier("rows") == [0, 1]
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
    nothing = ResultFile(None)
    nothing({"rows": []})
    assert nothing.earlier("rows") == []


def test_ours_are_blue_and_no_two_systems_look_alike() -> None:
    names = ["pixart_rt", "pixart_rt\ncached prompt", "diffusers", "diffusers compiled", "ours"]
    colors = colors_of(names)
    assert list(colors) == names and len(set(colors.values())) == len(names)
    blue = [int(color[5:], 16) > int(color[1:3], 16) for color in colors.values()]
    assert blue[:3] == [True, True, False] and blue[4]
