"""A file of prompts in UTF-8, one a line, as several commands take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixart_rt.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """Its lines without those that are empty. Raises ConfigError for a file without a prompt."""
    return [line for _, line in _numbered(path)]


def _numbered(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts {path} cannot be read ({error}); name a text file in UTF-8"
        ) from error
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"--prompts {path} has no prompt; write one a line")
    return found


FIELDS = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
          "aspect_ratio", "height", "width", "scheduler")  # fmt: skip


def prompt_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each line and its settings: a prompt alone, or in a .jsonl an object of FIELDS.

    Raises ConfigError that names the line.
    """
    if path.suffix.lower() != ".jsonl":
        for number, prompt in _numbered(path):
            yield number, {"prompt": prompt}
        return
    for number, text in _numbered(path):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--prompts {path}, line {number} is no JSON ({error})") from error
        if not isinstance(values, dict) or "prompt" not in values:
            raise ConfigError(
                f'--prompts {path}, line {number} must be an object such as {{"prompt": "a star"}}'
            )
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise ConfigError(
                f"--prompts {path}, line {number} has {', '.join(unknown)}; its fields may be "
                f"{', '.join(FIELDS)}"
            )
        yield number, values
