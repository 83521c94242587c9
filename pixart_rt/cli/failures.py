"""How a failure looks: one line for the user, and an exit code."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand

from pixart_rt.errors import ConfigError, PixArtError

FAILED, BAD_USE, INTERRUPTED = 1, 2, 130

_ALLOCATORS = ("can't allocate memory", "failed to allocate memory", "out of memory")
_OUT_OF_MEMORY = (
    "out of memory; close other programs, use fewer images at a time (-n, --max-batch), "
    "or half precision (--precision fp16)"
)
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_WRITERS = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter failed writing")
_DISK_FULL = "the disk is full; free space where the output goes, or choose another place"
_EXTRAS = {"matplotlib": "train", "pyarrow": "data"}  # what the base install lacks

_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*)|\['([^']+)'\])?`")  # `init`, `init=MODEL`, `data['HQ']`


class Verb(TyperCommand):
    """A verb whose errors name its options: the library's name the arguments of its functions."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. Parameters have the names of the function's arguments."""
        try:
            return super().invoke(ctx)
        except PixArtError as error:
            error.args = (with_flags(str(error), self.params),)
            raise


def with_flags(message: str, parameters: Sequence[Any]) -> str:
    """The message with `argument` as --argument, where the verb has a parameter of that name.

    `init=MODEL` becomes --init MODEL, and `data['HQ']` --data HQ=PATH.
    """
    flags = {
        each.name: each.opts[0] if each.param_type_name == "option" else each.metavar or each.name
        for each in parameters
    }

    def flag(match: re.Match[str]) -> str:
        name, value, key = match.groups()
        if name not in flags:
            return match[0]
        words = [flags[name], *([value] if value else []), *([f"{key}=PATH"] if key else [])]
        return " ".join(words)

    return _ARGUMENT.sub(flag, message)


def one_line(error: BaseException) -> str:
    """What went wrong and, where it is known, what to do about it."""
    if isinstance(error, PixArtError):
        return _flat(error)
    if _is_usage_error(error):
        said = _flat(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
        verb = getattr(getattr(error, "ctx", None), "command_path", "pixart-rt")
        return f"{said}; see `{verb} --help`"
    if _is_out_of_memory(error):
        detail = _flat(error)
        return f"{_OUT_OF_MEMORY} ({detail})" if detail else _OUT_OF_MEMORY
    if _is_disk_full(error):
        return f"{_DISK_FULL} ({_flat(error)})"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not UTF-8 ({error}); save it as UTF-8"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package)
        wanted = f"'pixart_rt[{extra}]'" if extra else package
        return f"the Python package {package} is not installed; run `pip install {wanted}`"
    if isinstance(error, OSError):
        reason = error.strerror or _flat(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    return f"{type(error).__name__}: {_flat(error)}"


@contextmanager
def options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Make a ConfigError of the library name the options of a verb.

    options: the option for each Python argument, such as {"num_inference_steps": "--steps"}. Texts
    in quotes are a user's own and stay, as do parts of paths and of other words.
    """
    try:
        yield
    except ConfigError as error:
        names = "|".join(map(re.escape, options))
        pattern = rf"(?<!\w)'[^']*'|(?<![\w:/.-])(?:{names})(?![\w:/.-])"
        said = re.sub(pattern, lambda name: options.get(name[0], name[0]), str(error))
        raise ConfigError(said) from error


def help_of_group(error: BaseException) -> str | None:
    """The help of a group that was given no verb, which Typer raises as an error."""
    if type(error).__name__ != "NoArgsIsHelpError":
        return None
    return str(error.format_message())  # type: ignore[attr-defined]


def exit_code(error: BaseException) -> int:
    if isinstance(error, PixArtError):
        return error.exit_code
    return BAD_USE if _is_usage_error(error) else FAILED


def is_expected(error: BaseException) -> bool:
    """Whether the line says all there is to say; otherwise the error is our own mistake."""
    expected = (PixArtError, OSError, ModuleNotFoundError, UnicodeDecodeError)
    known = (_is_usage_error, _is_out_of_memory, _is_disk_full)
    return isinstance(error, expected) or any(is_known(error) for is_known in known)


def _is_usage_error(error: BaseException) -> bool:
    """Typer's own errors. Their class moved between Typer's versions; this method did not."""
    return hasattr(error, "format_message")


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, PyTorch's (CUDA and CPU) or ONNX Runtime's; torch is not imported to ask."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in said for phrase in _ALLOCATORS)


def _is_disk_full(error: BaseException) -> bool:
    """The system's, or safetensors' and PyTorch's words for it; what was written is removed."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    said = str(error).lower()
    return isinstance(error, Exception) and any(phrase in said for phrase in _WRITERS)


def _flat(message: object) -> str:
    return " ".join(str(message).split())
