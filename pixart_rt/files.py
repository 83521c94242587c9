"""Outputs of every verb: what may be written where, and files and folders that are whole or absent.

    check_file(path, force=force)             before any work: a file that will be written
    check_folder(path, kind, force=force)     before any work: a folder that will be made as a whole
    check_into(path)                          before any work: a folder that files are added to
    with replacing(path) as new: ...          at the end: a file made aside, then renamed into place
    with replacing_folder(path, kind, force=force) as new: ...         likewise a folder

The policy, one for all:
- What exists is replaced only if asked (`force`).
- A folder is replaced only if it is one that we wrote, of the same kind, and holds nothing but what
  we wrote: the folder itself lists its files (a bundle's manifest, or LIST in other folders).
- A symbolic link is followed: what it points to is written, the link stays. A link inside a folder
  is not ours, so that folder is not replaced.
- Mount points, devices and pipes are refused, and so is a place where nothing can be written.

Work is done in a folder ".pixart-rt-XXXXXXXX" next to the target, which holds a lock while its
process lives. One whose process was killed is removed by the next run that writes in
the same folder, and if that process had just moved the older folder away, it is moved back first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pixart_rt.errors import ConfigError, DataError

LIST = "pixart_rt.json"  # in a folder that we wrote and that has no manifest of its own
FILE_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".json", ".jsonl", ".onnx", ".png", ".pt", ".pth", ".safetensors",
     ".toml", ".zip"}
)  # fmt: skip  # a folder with such a name was meant to be a file
MODEL_FILES = (".pth", ".safetensors")

_ASIDE = ".pixart-rt-"
_ASIDE_NAME = re.compile(rf"{re.escape(_ASIDE)}\w{{8}}")
_LOCK, _NEW, _OLD = "lock", "new", "old"
# Then the target's name, for what was moved away to be moved back.
_MAGIC = b"pixart-rt: left by a killed run unless locked; may be deleted\0"
_swept: set[Path] = set()  # folders this process has cleaned of left-overs; once is enough


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of folder that we write. `listed` gives the files that belong to one, relative and
    with "/", or None where the folder is not of this kind."""

    name: str  # with its article, such as "a bundle"
    listed: Callable[[Path], set[str] | None]


def listing_kind(name: str) -> Kind:
    """A kind whose folders list their files in LIST."""
    return Kind(name, lambda folder: _read_list(folder, name))


PIPELINE = listing_kind("a pipeline folder")
TRANSFORMER = listing_kind("a transformer folder")
ADAPTER = listing_kind("an adapter folder")
CONTROLNET = listing_kind("a ControlNet folder")
MODELS = (PIPELINE, TRANSFORMER, ADAPTER, CONTROLNET)


def check_file(path: str | Path, *, force: bool) -> None:
    """Refuse a file that could not be written at the end of the work. Raises ConfigError."""
    place = _follow(path)
    if place.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    _check_place(path, place)
    if place.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name, or replace it with --force")


def check_folder(path: str | Path, kind: Kind | Iterable[Kind], *, force: bool) -> None:
    """Refuse a folder that could not take its place at the end of the work. Raises ConfigError.

    Several kinds: where the work will tell which; one of them is enough.
    """
    place = _follow(path)
    kinds = [kind] if isinstance(kind, Kind) else list(kind)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{path} is a file; name a folder")
    if place.suffix.lower() in FILE_SUFFIXES and not place.exists():
        raise ConfigError(
            f"{path} would be {_either(kinds)}, but has the name of a {place.suffix} file; name a "
            "folder"
        )
    _check_place(path, place)
    if place.is_dir() and any(place.iterdir()):
        _refuse_foreign(path, place, kinds)
        if not force:
            raise ConfigError(f"{path} exists; choose another name, or replace it with --force")


def check_source(path: str | Path, holds: str) -> None:
    """Refuse a folder to read that is not there, before seconds of imports. Raises DataError.

    holds: what should be in it, for the message.
    """
    if not Path(path).is_dir():
        raise DataError(f"{path} is no folder; give one that holds {holds}")


def check_into(path: str | Path) -> None:
    """Refuse a folder that files could not be added to. Raises ConfigError."""
    place = _follow(path)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{path} is a file; name a folder")
    _check_writable(path, place)


def check_model(path: str | Path, kind: Kind | Iterable[Kind] = MODELS, *, force: bool) -> None:
    """The same for weights that are written as a file or as a folder, by the suffix."""
    kinds = [kind] if isinstance(kind, Kind) else list(kind)
    if Path(path).suffix == ".pth" or (TRANSFORMER in kinds and is_model_file(path)):
        check_file(path, force=force)
    else:
        check_folder(path, kind, force=force)


def is_model_file(path: str | Path) -> bool:
    """Whether a transformer of this name is one file, of the original layout."""
    return Path(path).suffix in MODEL_FILES


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A free path next to `target`; what is made there takes its place. For a file that the caller
    may replace (check_file), and for a folder that is not there or empty.

    An error inside the block leaves `target` as it was and nothing next to it.
    """
    with _making(target, None) as new:
        yield new


@contextmanager
def replacing_folder(target: str | Path, kind: Kind, *, force: bool) -> Iterator[Path]:
    """A new folder that takes `target`'s place, which is checked again then: hours may have passed.

    The folder says what belongs to it: in LIST, unless the kind has a manifest that was written.
    """
    check_folder(target, kind, force=force)
    with _making(target, kind) as new:
        new.mkdir()
        yield new
        if kind.listed(new) is None:
            _write_list(new, kind.name)
        if not force:
            check_folder(target, kind, force=False)


@contextmanager
def workplace(parent: Path, target: str = "") -> Iterator[Path]:
    """A folder of our own inside `parent`, removed at the end; or by another run, after a kill."""
    folder, lock = _claim(parent, target)
    try:
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work on what `path` stands for; free again when the process ends."""
    import fcntl  # not on Windows, where only inference runs

    with path.open(
        "a", encoding="utf-8"
    ) as file:  # "w" would empty a file of this name that is not ours
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def foreign_entry(folder: Path, listed: set[str]) -> str | None:
    """The first entry below `folder` that is not one of the listed files: a file, a folder without
    listed files, a link or anything else."""
    parents = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for root, folders, files in os.walk(folder, onerror=_raise):
        here = Path(root).relative_to(folder)
        for name in sorted([*folders, *files]):
            entry = (here / name).as_posix()
            kept = parents if name in folders else listed
            mode = (folder / entry).lstat().st_mode
            if entry not in kept or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return entry
    return None


def _raise(error: OSError) -> None:
    raise error  # what cannot be read is not known to be ours


def sweep(parent: Path) -> None:
    """Remove what killed runs left in a folder. What a living one works on stays."""
    _swept.add(parent)
    with suppress(OSError):
        found = [entry.name for entry in os.scandir(parent) if _ASIDE_NAME.fullmatch(entry.name)]
        for name in found:
            with suppress(OSError):
                _remove_left_over(parent / name)


def _follow(path: str | Path) -> Path:
    """The absolute path behind all links; it need not exist."""
    try:
        place = Path(path).resolve()
        place.exists()  # raises what stands in the way: a name too long, a folder without access
        return place
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null character
        raise ConfigError(f"{str(path)!r} is no usable path ({error}); choose another") from error


def _check_place(path: str | Path, place: Path) -> None:
    """Refuse what a rename could not replace, and a folder that takes no new entries."""
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise ConfigError(f"{path} is a device or a pipe; name a regular file or a folder")
    if _is_mount_point(place):
        raise ConfigError(
            f"{path} is a mount point, which cannot be replaced as a whole; name something inside "
            f"it, such as {Path(path) / 'out'}"
        )
    _check_writable(path, place, place.parent)


def _check_writable(path: str | Path, place: Path, inside: Path | None = None) -> None:
    """Make and remove a folder at the nearest place that exists: permissions, read-only disks and
    folders such as /proc are only known by trying."""
    start = inside or place
    nearest = next(each for each in (start, *start.parents) if each.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{path} cannot be written: {nearest} is a file; choose another")
    longest = _longest_name(nearest)
    for name in place.relative_to(nearest).parts:
        if len(os.fsencode(name)) > longest:
            raise ConfigError(
                f"{path} cannot be written: a name has at most {longest} bytes there; choose a "
                "shorter one"
            )
    sweep(nearest)
    try:
        with workplace(nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {nearest} takes no new files ({error.strerror}); choose "
            "another, or change its permissions"
        ) from error


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 255


def _refuse_foreign(path: str | Path, place: Path, kinds: list[Kind]) -> None:
    """ConfigError unless the folder is of one of these kinds and holds nothing else."""
    found = [listed for kind in kinds if (listed := kind.listed(place)) is not None]
    if not found:
        raise ConfigError(
            f"{path} exists and is not {_either(kinds)} that pixart-rt wrote; choose another name, "
            "or remove it"
        )
    entry = foreign_entry(place, found[0])
    if entry is not None:
        raise ConfigError(
            f"{path} holds {entry}, which is not part of it and would be lost; move it away, or "
            "choose another name"
        )


def _either(kinds: list[Kind]) -> str:
    return " or ".join(kind.name for kind in kinds) if len(kinds) < 3 else "a folder"


@contextmanager
def _making(target: str | Path, kind: Kind | None) -> Iterator[Path]:
    place = _follow(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.parent not in _swept:
        sweep(place.parent)
    with workplace(place.parent, place.name) as folder:
        yield folder / _NEW
        _put(target, place, folder, kind)


def _put(target: str | Path, place: Path, folder: Path, kind: Kind | None) -> None:
    """Rename what was made to its place; on an error what was there is there again."""
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise ConfigError(f"{target} is a device or a pipe; name a regular file")
    if place.is_dir() != (folder / _NEW).is_dir() and place.exists():
        raise ConfigError(f"{target} is a {'folder' if place.is_dir() else 'file'}; choose another")
    if not place.is_dir() or not any(place.iterdir()):
        os.replace(folder / _NEW, place)  # a folder takes the place of an empty one
        return
    if kind is None:
        raise ConfigError(f"{target} is a folder that holds something; choose another")
    _move(place, folder / _OLD)
    try:
        _refuse_foreign(target, folder / _OLD, [kind])  # now that nobody can add to it
        os.replace(folder / _NEW, place)
    except BaseException:
        os.rename(folder / _OLD, place)
        raise


def _move(folder: Path, to: Path) -> None:
    try:
        os.rename(folder, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(folder, to, symlinks=True)  # an overlay's lower layer cannot be renamed
        shutil.rmtree(folder)


def _claim(parent: Path, target: str) -> tuple[Path, IO[bytes]]:
    """A new folder and its lock. A run that sweeps may remove it before it is locked: once more."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=parent))
        try:
            file = (folder / _LOCK).open("xb")
        except FileNotFoundError:
            continue
        try:
            held = _try_lock(file)
            if held is not False and os.path.samestat(os.fstat(file.fileno()), _status(folder)):
                file.write(_MAGIC + os.fsencode(target))
                file.flush()
                return folder, file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        file.close()


def _status(folder: Path) -> os.stat_result:
    return (folder / _LOCK).stat()


def _try_lock(file: IO[bytes]) -> bool | None:
    """True where the lock is ours now, False where another process has it, None without locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        return None
    return True


def _remove_left_over(folder: Path) -> None:
    if folder.is_symlink():
        return
    if not any(folder.iterdir()):
        folder.rmdir()
        return
    with (folder / _LOCK).open("rb+") as file:
        if _try_lock(file) is not True:
            return
        text = file.read()
        if text and not text.startswith(_MAGIC):
            return
        name = os.fsdecode(text.removeprefix(_MAGIC))
        if name and (folder / _OLD).exists() and not os.path.lexists(folder.parent / name):
            os.rename(folder / _OLD, folder.parent / name)
        shutil.rmtree(folder, ignore_errors=True)


def _is_mount_point(path: Path) -> bool:
    """Also of a bind mount, which os.path.ismount does not see, and of a file."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(path)
    for byte in b"\\ \t\n":  # the backslash first: it is what the others are written with
        name = name.replace(bytes([byte]), b"\\%03o" % byte)
    return any(line.split(b" ")[4] == name for line in mounts)


def _read_list(folder: Path, kind: str) -> set[str] | None:
    try:
        values = read_json(folder / LIST)
        if values["kind"] != kind:
            return None
        return {LIST, *map(str, values["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_list(folder: Path, kind: str) -> None:
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )
    values = {"made_by": "pixart-rt", "kind": kind, "files": [n for n in names if n != LIST]}
    (folder / LIST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file in UTF-8 holds. Raises OSError, and ValueError for anything else."""
    return parse_json(path.read_bytes())


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for nesting that Python cannot follow."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
