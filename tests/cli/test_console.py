"""Bars and lines on a terminal of 80 and 120 columns: neither writes over the other."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pixart_rt import stderr_console
from pixart_rt.cli import console as cli_console
from pixart_rt.cli.console import Steps, note
from pixart_rt.training import log_writers
from pixart_rt.training.log_writers import ConsoleWriter

ERASE = "\x1b[2K"  # what rich writes before it draws over a bar


@pytest.mark.parametrize("width", [80, 120])
def test_lines_appear_above_a_running_bar(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=width, highlight=False)
    for module in (stderr_console, cli_console, log_writers):
        monkeypatch.setattr(module, "stderr", lambda: terminal)
    with Steps() as progress:
        progress("training", 1, 3)
        ConsoleWriter().console.print("step 2/3")  # what a writer of its own choice uses
        progress("training", 2, 3)
        note("warning: something")
    text = shown.getvalue()
    for line in ("step 2/3", "warning: something"):
        before = re.split(r"[\r\n]", text[: text.index(line)])[-1]
        assert before.endswith(ERASE), f"{line!r} follows {before!r}"
    bars = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"[\r\n]", text)]
    assert max(map(len, bars)) <= width


def test_log_lines_and_bars_share_one_console() -> None:
    assert ConsoleWriter().console is cli_console.stderr()
