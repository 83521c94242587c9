"""Values out of JSON, held against the types that a dataclass says of them."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def check_types(record: Any) -> None:
    """TypeError for the first field whose value is not of its type; an int is a float, too."""
    hints = _hints(type(record))  # type: ignore[arg-type]
    for field in fields(record):
        value = getattr(record, field.name)
        if not _is(value, hints[field.name]):
            raise TypeError(f"{field.name} is {str(value)[:40]!r}, not {hints[field.name]}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is float:  # neither NaN nor infinity, nor an integer that no float is
        whole = type(value) is int and value.bit_length() < 1024
        return whole or (type(value) is float and math.isfinite(value))
    if kind is UnionType:
        return any(_is(value, each) for each in arguments)
    if kind is dict:
        return isinstance(value, dict) and all(
            _is(key, arguments[0]) and _is(each, arguments[1]) for key, each in value.items()
        )
    if kind in (list, tuple):
        return isinstance(value, kind) and all(_is(each, arguments[0]) for each in value)
    if hint in (int, bool):
        return type(value) is hint
    return isinstance(value, hint)
