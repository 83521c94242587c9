"""Any failure is one line on stderr with a fitting exit code; --debug shows where it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from pixart_rt.bundle import Manifest
from pixart_rt.cli.app import app
from pixart_rt.cli.failures import with_flags
from pixart_rt.errors import BundleError, ConfigError

CASES: list[tuple[BaseException, int, str]] = [
    (BundleError("two\nlines"), 1, "two lines"),
    (ConfigError("cannot be"), 2, "cannot be"),
    (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        1,
        "the disk is full; free space",
    ),
    (MemoryError(), 1, "--max-batch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 1, "Tried 2 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory;"),
    (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"), 1, "[train]'"),
    (ModuleNotFoundError("No module named 'abc1'", name="abc1"), 1, "pip install abc1"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make reading any manifest raise."""

    def fail_with(error: BaseException) -> None:
        def read(_folder: Path) -> Manifest:
            raise error

        monkeypatch.setattr(Manifest, "read", read)

    return fail_with


@pytest.mark.parametrize(("error", "code", "message"), CASES, ids=lambda case: str(case)[:30])
def test_expected_errors_are_one_line(
    run: Callable[..., Any], failing: Callable[..., None], error: Exception, code: int, message: str
) -> None:
    failing(error)
    outcome = run("inspect", "anything")
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.error
    assert outcome.err.count("\n") == 1


def test_our_own_mistakes_name_the_way_to_see_more(
    run: Callable[..., Any], failing: Callable[..., None]
) -> None:
    failing(ZeroDivisionError("division by zero"))
    outcome = run("inspect", "anything")
    assert outcome.code == 1
    assert outcome.error == "ZeroDivisionError: division by zero"
    assert "--debug" in outcome.err


def test_an_interrupt_is_one_line_and_130(
    run: Callable[..., Any], failing: Callable[..., None]
) -> None:
    failing(KeyboardInterrupt())
    outcome = run("inspect", "anything")
    assert (outcome.code, outcome.error) == (130, "interrupted")


@pytest.mark.parametrize("words", [("--debug", "inspect", "x"), ("inspect", "x", "--debug")])
def test_debug_keeps_the_traceback(
    run: Callable[..., Any], failing: Callable[..., None], words: tuple[str, ...]
) -> None:
    failing(ConfigError("cannot be"))
    with pytest.raises(ConfigError, match="cannot be"):
        run(*words)


@pytest.mark.parametrize(("said", "shown"), [
    ("give it as `init`, or `micro_batches`", "give it as --init, or --micro-batches"),
    ("choose `device=cpu`", "choose --device cpu"),
    ("say where with `data['HQ']`", "say where with --data HQ=PATH"),
    ("a `recipe` and its `phases`", "a RECIPE and its --phase"),
    ("`betas`; `pixart-rt data extract`", "`betas`; `pixart-rt data extract`"),
])  # fmt: skip
def test_arguments_are_shown_as_options(said: str, shown: str) -> None:
    """Of `train`: what it has no option for, and commands, stay as they are."""
    group: Any = typer.main.get_command(app)
    assert with_flags(said, group.commands["train"].params) == shown


def test_an_error_of_the_library_names_the_option(run: Callable[..., Any], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.toml"
    words = ("train", recipe, "--out", tmp_path, "--micro-batches", 0)
    assert run(*words).error == "--micro-batches must be > 0, got 0"
