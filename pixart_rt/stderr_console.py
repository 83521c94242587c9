"""The one console on stderr. Progress bars and log lines share it, so that a line appears above a
running bar; two consoles would write over each other.
"""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def stderr() -> Console:
    """The console of this process. It writes to what sys.stderr is at that moment."""
    return Console(stderr=True, highlight=False)
