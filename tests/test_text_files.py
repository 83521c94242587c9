"""Every text file that we read or write names its encoding: Windows' own is not UTF-8."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pixart_rt", "kernels", "export", "training", "examples", "benchmarks")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if folder != "pixart_rt"
    or path.relative_to(ROOT / folder).parts[0] not in ("kernels", "export", "training")
)
TEMPORARY = {"NamedTemporaryFile", "TemporaryFile"}  # binary unless a mode says otherwise


def without_encoding(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the machine."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
            node.func, "id", ""
        )  # fmt: skip
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            names_one = len(node.args) > (name == "write_text")
            if not names_one:
                yield node
        elif name in ("open", "fdopen", *TEMPORARY) and _is_text(node, name):
            yield node


def _is_text(node: ast.Call, name: str) -> bool:
    """True for a file that is opened as text; not for other things that have an `open`."""
    owner = getattr(getattr(node.func, "value", None), "id", None)
    if name == "open" and owner in ("Image", "os", "webbrowser", "zipfile"):
        return False  # os.open gives a descriptor
    method = isinstance(node.func, ast.Attribute) and name == "open"  # path.open(mode)
    place = 0 if method or name in TEMPORARY else 1
    mode = node.args[place] if len(node.args) > place else None
    for keyword in node.keywords:
        if keyword.arg == "mode":
            mode = keyword.value
    if mode is None:
        if name in TEMPORARY:
            return False
        return not method or not node.args
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_text_is_read_and_written_as_utf_8(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    lines = [f"{path}:{node.lineno}: {ast.unparse(node)}" for node in without_encoding(source)]
    assert not lines, 'add encoding="utf-8"'


def test_the_search_finds_what_it_should() -> None:
    bad = ['p.read_text()', 'p.write_text("x")', 'open(p)', 'open(p, "w")', 'p.open()',
           'p.open("a")', 'os.fdopen(d, "w")']  # fmt: skip
    good = ['p.read_text(encoding="utf-8")', 'p.write_text("x", encoding="utf-8")', 'p.open("rb")',
            'open(p, "wb")', 'open(p, encoding="utf-8")', 'Image.open(p)', 'os.open(p, 0)',
            'NamedTemporaryFile()', 'store.open(config, device)']  # fmt: skip
    assert [len(list(without_encoding(line))) for line in bad] == [1] * len(bad)
    assert [len(list(without_encoding(line))) for line in good] == [0] * len(good)
