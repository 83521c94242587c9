"""`pixart-rt`: one module a verb. `main` is the console script.

stdout   the result: a path, a table, or with --json one JSON document
stderr   progress, notes, and on failure one line that begins with `error:`
exit     0 done, 1 failed, 2 bad use, 130 interrupted
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. With --debug errors keep their traceback."""
    from pixart_rt.cli.app import app
    from pixart_rt.cli.console import log_to_stderr
    from pixart_rt.cli.failures import INTERRUPTED, exit_code, help_of_group, is_expected, one_line

    arguments, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # so that half-made files are removed
    try:
        with log_to_stderr():
            code = app(arguments or ["--help"], prog_name="pixart-rt", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        help_text = help_of_group(error)
        if help_text is not None:  # as `pixart-rt` alone does
            print(help_text)
            return 0
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        if not is_expected(error):
            print("this is a bug; the same command with --debug shows where", file=sys.stderr)
        return exit_code(error)
    if code == INTERRUPTED:
        print("error: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, which may stand anywhere before a `--`, and whether it did."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    kept = [word for word in argv[:end] if word != "--debug"]
    return [*kept, *argv[end:]], len(kept) < end
