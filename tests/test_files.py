"""The one policy for outputs: what is refused before work, what is replaced, what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from pixart_rt import files
from pixart_rt.errors import ConfigError
from pixart_rt.files import (
    ADAPTER,
    LIST,
    PIPELINE,
    check_file,
    check_folder,
    check_into,
    foreign_entry,
    locked,
    replacing,
    replacing_folder,
    sweep,
    workplace,
)

LONGEST = 255  # bytes of a name, on every file system that tests run on


def make(folder: Path, text: str = "first", *, force: bool = False) -> None:
    """An adapter folder with a file at two depths."""
    with replacing_folder(folder, ADAPTER, force=force) as new:
        (new / "deep").mkdir()
        (new / "weights").write_text(text)
        (new / "deep" / "config").write_text(text)


def snapshot(folder: Path) -> dict[str, str | None]:
    """Every entry below a folder, with its text."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_folder_of_ours_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "a")
    before = snapshot(tmp_path / "a")
    assert json.loads(str(before[LIST]))["files"] == ["deep/config", "weights"]
    with pytest.raises(ConfigError, match="exists; choose another name, or replace it with"):
        make(tmp_path / "a", "second")
    assert snapshot(tmp_path / "a") == before
    make(tmp_path / "a", "second", force=True)
    assert (tmp_path / "a" / "weights").read_text() == "second"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "entry",
    [
        "notes.txt",
        ".hidden",
        "deep/mine",
        "outputs/",
        "outputs/my.png",
        "deep/empty/",
        "link",
        "to/",
    ],
)
def test_what_a_folder_does_not_list_is_never_lost(tmp_path: Path, entry: str) -> None:
    """Not with force either: a user's file, an empty folder, links."""
    folder = tmp_path / "a"
    make(folder)
    (tmp_path / "elsewhere").mkdir()
    if entry in ("link", "to/"):
        (folder / entry.strip("/")).symlink_to(tmp_path / "elsewhere")
    elif entry.endswith("/"):
        (folder / entry).mkdir()
    else:
        (folder / entry).parent.mkdir(exist_ok=True)
        (folder / entry).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=f"holds {entry.split('/')[0]}.* would be lost"):
        make(folder, "second", force=True)
    with pytest.raises(ConfigError, match="would be lost"):
        check_folder(folder, ADAPTER, force=True)
    assert snapshot(tmp_path) == before


def test_a_listed_file_that_became_a_link_is_not_replaced(tmp_path: Path) -> None:
    make(tmp_path / "a")
    shared = (tmp_path / "a" / "weights").rename(tmp_path / "shared")
    (tmp_path / "a" / "weights").symlink_to(shared)
    with pytest.raises(ConfigError, match="holds weights"):
        make(tmp_path / "a", "second", force=True)
    assert shared.read_text() == "first" and (tmp_path / "a" / "weights").is_symlink()


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "My PWA"}', '{"kind": "a pipeline folder", "files": ["index.html"]}', "["],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, manifest: str) -> None:
    """Also one that we wrote as another kind of thing."""
    (tmp_path / LIST).write_text(manifest)
    (tmp_path / "index.html").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="is not an adapter folder that pixart-rt wrote"):
        make(tmp_path, force=True)
    assert snapshot(tmp_path) == before


def test_a_file_added_during_the_work_is_kept(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with (
        pytest.raises(ConfigError, match=r"holds late\.txt"),
        replacing_folder(tmp_path / "a", ADAPTER, force=True) as new,
    ):
        (new / "weights").write_text("second")
        (tmp_path / "a" / "late.txt").write_text("mine")
    assert (tmp_path / "a" / "late.txt").read_text() == "mine"
    assert (tmp_path / "a" / "weights").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_two_at_once_the_later_does_not_replace_the_earlier(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="exists"),
        replacing_folder(tmp_path / "a", ADAPTER, force=False) as new,
    ):
        (new / "weights").write_text("second")
        make(tmp_path / "a", "first")
    assert (tmp_path / "a" / "weights").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    make(tmp_path / "a")
    before = snapshot(tmp_path)
    with pytest.raises(KeyError), replacing_folder(tmp_path / "a", ADAPTER, force=True) as new:
        (new / "weights").write_text("half")
        raise KeyError
    assert snapshot(tmp_path) == before


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/a")
    make(tmp_path / "link")
    make(tmp_path / "link", "second", force=True)
    assert os.readlink(tmp_path / "link") == "disk/a"
    assert (tmp_path / "disk" / "a" / "weights").read_text() == "second"
    (tmp_path / "o.json").symlink_to("disk/o.json")
    with replacing(tmp_path / "o.json") as new:
        new.write_text("{}")
    assert (tmp_path / "o.json").is_symlink() and (tmp_path / "disk" / "o.json").is_file()
    assert sorted(os.listdir(tmp_path / "disk")) == ["a", "o.json"]
    (tmp_path / "loop").symlink_to("loop")
    for check in (check_into, lambda path: check_file(path, force=True)):
        with pytest.raises(ConfigError, match="loop"):
            check(tmp_path / "loop")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("here.txt/o.json", "here.txt is a file"),
        ("n" * (LONGEST + 1), "name"),
        ("new/" + "é" * 200, "name"),
        ("/proc/o.json", "takes no new files"),
        ("/dev/null", "a device or a pipe"),
        ("a\0b", "no usable path"),
        ("folder", "is a folder"),
        ("here.txt", "exists"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_work(
    tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "here.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_file(tmp_path / path, force=False)
    assert snapshot(tmp_path) == before
    check_file(tmp_path / "new" / "deep" / "o.json", force=False)
    check_file(tmp_path / "here.txt", force=True)
    assert snapshot(tmp_path) == before, "a check makes nothing"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("here.txt", "is a file"),
        ("here.txt/a", "here.txt is a file"),
        ("y.safetensors", r"has the name of a \.safetensors file"),
        ("/proc/a", "takes no new files"),
        ("/", "mount point"),
        ("/proc", "mount point"),
    ],
)
def test_a_folder_that_could_not_be_written_is_refused_before_work(
    tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "here.txt").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        check_folder(tmp_path / path, (ADAPTER, PIPELINE), force=True)
    assert os.listdir(tmp_path) == ["here.txt"]


def test_the_longest_names_work(tmp_path: Path) -> None:
    """What is made aside must not have a longer name."""
    name = "n" * LONGEST
    check_file(tmp_path / name, force=False)
    with replacing(tmp_path / name) as new:
        new.write_text("x")
    assert os.listdir(tmp_path) == [name]


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="a device or a pipe"):
        check_file(tmp_path / "pipe", force=True)
    with (
        pytest.raises(ConfigError, match="a device or a pipe"),
        replacing(tmp_path / "pipe") as new,
    ):
        new.write_text("x")
    assert (tmp_path / "pipe").is_fifo()


def test_mount_points_are_known_by_their_odd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount on the same disk, which os.path.ismount does not see."""
    place = tmp_path / "a b\\c"
    place.mkdir()
    check_folder(place, ADAPTER, force=True)
    escaped = os.fsencode(place).replace(b"\\", b"\\134").replace(b" ", b"\\040")
    real = Path.read_bytes
    line = b"36 35 98:0 /vol " + escaped + b" rw,noatime - ext4 /dev/root rw\n"

    def read(path: Path) -> bytes:
        return line if path == Path("/proc/self/mountinfo") else real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(ConfigError, match=r"mount point.*name something inside it"):
        check_folder(place, ADAPTER, force=True)
    check_folder(place / "inside", ADAPTER, force=True)
    check_into(place)


def kill_inside(code: str, folder: Path) -> None:
    """Run code in a process that a SIGKILL ends where it says `die()`."""
    head = f"""
        import os, signal
        from pathlib import Path
        from pixart_rt import files
        from pixart_rt.files import ADAPTER, replacing, replacing_folder
        here = Path({str(folder)!r})
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)], timeout=120
    )
    assert done.returncode == -signal.SIGKILL


LATER: list[Callable[[Path], object]] = [
    sweep,
    lambda folder: check_file(folder / "other.json", force=False),
    lambda folder: check_into(folder / "new" / "run"),
]


@pytest.mark.parametrize("later", LATER)
def test_what_a_killed_run_left_is_removed_by_the_next(
    tmp_path: Path, later: Callable[[Path], object]
) -> None:
    kill_inside(
        """
        with replacing(here / "o.json") as new:
            new.write_text("half")
            die()
        """,
        tmp_path,
    )
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".pixart-rt-")
    later(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The older folder was moved away, the new one was not there yet."""
    make(tmp_path / "a")
    before = snapshot(tmp_path)
    kill_inside(
        """
        files.os.replace = die
        with replacing_folder(here / "a", ADAPTER, force=True) as new:
            (new / "weights").write_text("second")
        """,
        tmp_path,
    )
    assert not (tmp_path / "a").exists(), "this is the moment that is meant"
    sweep(tmp_path)
    assert snapshot(tmp_path) == before


def test_what_a_living_run_works_on_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "o.json") as new:
        new.write_text("half")
        sweep(tmp_path)
        check_file(tmp_path / "o.json", force=False)
        assert new.read_text() == "half"
    assert (tmp_path / "o.json").read_text() == "half"


@pytest.mark.parametrize("name", [".pixart-rt-abcdefgh", ".pixart-rt-short", ".a.12345678"])
def test_a_users_folder_that_looks_like_a_left_over_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "lock").write_text("mine")
    (tmp_path / name / "thesis").write_text("mine")
    before = snapshot(tmp_path)
    sweep(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_workplace_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = files._try_lock, []

    def sweep_once(file):  # between making the lock file and locking it
        if not swept:
            swept.append(Path(file.name).parent)
            shutil.rmtree(swept[0])
        return real(file)

    monkeypatch.setattr(files, "_try_lock", sweep_once)
    with workplace(tmp_path) as folder:
        assert folder.is_dir() and swept and folder != swept[0]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_layer_holds_is_copied_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay's lower layer (an image's folder in a container) gives EXDEV for a rename."""
    make(tmp_path / "a")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source) == tmp_path / "a":
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(files.os, "rename", rename)
    make(tmp_path / "a", "second", force=True)
    assert (tmp_path / "a" / "weights").read_text() == "second"
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="holds mine"):
        make(tmp_path / "a", "third", force=True)
    assert (tmp_path / "a" / "mine").read_text() == "mine"


def test_a_lock_does_not_empty_a_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path / ".lock") as first, locked(tmp_path / ".lock") as second:
        assert first and not second
    assert (tmp_path / ".lock").read_text() == "mine"


def test_foreign_entry_names_the_first(tmp_path: Path) -> None:
    make(tmp_path / "a")
    listed = ADAPTER.listed(tmp_path / "a")
    assert listed is not None and foreign_entry(tmp_path / "a", listed) is None
    assert foreign_entry(tmp_path / "a", listed - {"deep/config"}) == "deep"
