"""docs/api.md: its examples run, and its signatures are those of the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pixart_rt
from pixart_rt import EngineConfig, PixArtPipeline, Request, SamplingConfig, build, train
from pixart_rt.inference.generation import ImageResult, PipelineOutput

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("no_kernels")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(BLOCKS) > 8
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert (tmp_path / "circle.png").is_file()


@pytest.mark.parametrize("name", pixart_rt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    words = set(re.findall(r"`([^`\n(.]+)", PAGE))
    assert name in words, f"docs/api.md does not name {name}"


@pytest.mark.parametrize(
    ("shown", "function"),
    [
        ("PixArtPipeline.from_pretrained", PixArtPipeline.from_pretrained),
        ("PixArtPipeline.from_bundle", PixArtPipeline.from_bundle),
        ("pipe", PixArtPipeline.__call__),
        ("pipe.stream", PixArtPipeline.stream),
        ("pipe.warmup", PixArtPipeline.warmup),
        ("Request", Request),
        ("build", build),
        ("EngineConfig", EngineConfig),
        ("train", train),
        ("SamplingConfig", SamplingConfig),
    ],
)
def test_signatures_are_those_of_the_code(shown: str, function: Callable[..., Any]) -> None:
    """Names in their order; simple defaults as they are, others as `...`."""
    found = re.search(rf"`{re.escape(shown)}\(([^`]*)\)`", PAGE)
    assert found, shown
    words = re.split(r",\s+(?![^(]*\))", " ".join(found[1].split()))
    told = dict(word.split("=", 1) if "=" in word else (word, "") for word in words)
    told.pop("*", None)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }
    assert list(told) == list(parameters), shown
    for name, parameter in parameters.items():
        default = parameter.default
        if told[name] in ("...", ""):
            assert (told[name] == "") == (default is parameter.empty), name
        else:
            text = f"{type(default).__name__}.{default.name}" if hasattr(default, "name") else ""
            assert told[name] == (text or repr(default).replace("'", '"')), name


def test_generate_many_takes_what_stream_does() -> None:
    streams = set(inspect.signature(PixArtPipeline.stream).parameters)
    many = set(inspect.signature(PixArtPipeline.generate_many).parameters)
    assert streams - many == {"callback_on_step_end"} and not many - streams


@pytest.mark.parametrize("record", [PipelineOutput, ImageResult])
def test_fields_of_results_are_there(record: type) -> None:
    for name in record.__dataclass_fields__:  # type: ignore[attr-defined]
        assert f"`{name}`" in PAGE, name
