"""Run an example's `main`: an error that the library raises is one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pixart_rt.cli.failures import one_line
from pixart_rt.errors import PixArtError


def run_script(main: Callable[[], None]) -> None:
    """Call `main`, which reads the command line; exit as `pixart-rt` does."""
    try:
        main()
    except PixArtError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
