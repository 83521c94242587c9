"""A TOML file as a frozen dataclass: tables as dataclasses, lists as tuples, words as enums.

Unknown keys are refused, so that a misspelt one is not a setting left at its default.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pixart_rt.errors import ConfigError

T = TypeVar("T")


def read_settings(kind: type[T], path: Path) -> T:
    """The file as `kind`. Raises ConfigError in one line that names the file and the setting."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a TOML file") from error
    return parse(kind, values, str(path))


def parse(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A table as a frozen dataclass. Raises ConfigError for keys that it has not, or lacks."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"{where} has the unknown setting {unknown[0]}; there are {', '.join(known)}"
        )
    lacking = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in values
    ]
    if lacking:
        raise ConfigError(f"{where} lacks the setting {lacking[0]}")
    taken = {name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**taken)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    """A TOML value as a field's type; ConfigError where it is of another."""
    if get_origin(kind) is UnionType:
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        one = get_args(kind)[0]
        return tuple(_value(one, each, f"{where}[{i}]") for i, each in enumerate(value))
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, got {value!r}")
        return parse(kind, value, where)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value not in [each.value for each in kind]:
            raise ConfigError(f"{where} is {value!r}; choose from {', '.join(kind)}")
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}")
    return value
