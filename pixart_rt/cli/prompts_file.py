"""A file of prompts, one a line, as several commands take it."""

from __future__ import annotations

from pathlib import Path

from pixart_rt.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """Its lines without those that are empty. Raises ConfigError for a file without a prompt."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read ({error}); name a text file") from error
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"--prompts {path} has no prompt; write one a line")
    return found
