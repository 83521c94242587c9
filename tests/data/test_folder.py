"""ImageFolder metadata: lines found, captions read, mistakes told in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from pixart_rt.data import folder as folder_module
from pixart_rt.data.folder import ImageFolder
from pixart_rt.errors import DataError


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def line(name: str, **columns: object) -> str:
    return json.dumps({"file_name": name, **columns}, ensure_ascii=False)


def test_lines_are_found_however_the_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK", 7)  # a line end may lie anywhere between chunks
    rows = [line("a.png", text="one"), line("b/ü.png", text="zwei – ü"), line("c.png", text="")]
    expected = [("a.png", "one"), ("b/ü.png", "zwei – ü"), ("c.png", "")]
    for joint, tail in (("\n", "\n"), ("\n", ""), ("\r\n", "\r\n"), ("\n\n", "\n\n")):
        write(tmp_path / "metadata.jsonl", joint.join(rows) + tail)
        images = ImageFolder(tmp_path)
        assert [(e.file_name, e.caption) for e in map(images.__getitem__, range(3))] == expected
        assert len(images) == 3
        assert images[1].path == tmp_path / "b" / "ü.png"
        with pytest.raises(IndexError):
            images[3]


def test_metadata_of_subfolders_in_the_order_of_their_paths(tmp_path):
    write(tmp_path / "b" / "metadata.jsonl", line("1.png", text="third"))
    write(tmp_path / "a" / "x" / "metadata.jsonl", line("2.png", text="first") + "\n" +
          line("y/3.png", text="second"))  # fmt: skip
    write(tmp_path / "c" / "metadata.jsonl", "")
    images = ImageFolder(tmp_path)
    assert [images[i].caption for i in range(len(images))] == ["first", "second", "third"]
    assert images[1].file_name == "a/x/y/3.png"
    again = pickle.loads(pickle.dumps(images))
    assert again[2] == images[2]
    assert again.digest() == images.digest()


def test_the_digest_sees_every_change(tmp_path):
    write(tmp_path / "metadata.jsonl", line("a.png", text="x"))
    first = ImageFolder(tmp_path).digest()
    write(tmp_path / "metadata.jsonl", line("a.png", text="y"))
    assert ImageFolder(tmp_path).digest() != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"file_name": "a.png"', "line 2 is not JSON"),
        ("[1, 2, 3]", "line 2 is not a JSON object"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": "b.png", "text": 5}', r"line 2 \(b.png\) has no text in column 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, words):
    write(tmp_path / "metadata.jsonl", line("a.png", text="x") + "\n" + text + "\n")
    images = ImageFolder(tmp_path)
    assert images[0].caption == "x"
    with pytest.raises(DataError, match=words):
        images[1]


def test_a_wrong_folder_or_column_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no metadata\.jsonl; write one"):
        ImageFolder(tmp_path)
    write(tmp_path / "metadata.jsonl", "\n")
    with pytest.raises(DataError, match="is empty"):
        ImageFolder(tmp_path)
    write(tmp_path / "metadata.jsonl", line("a.png", caption="x", number=3))
    with pytest.raises(DataError, match="no text column 'text', it has caption; name one"):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, "caption")[0].caption == "x"


def test_half_an_emoji_is_replaced_in_a_caption(tmp_path):
    """JSON can hold a lone surrogate, Parquet and tokenizers cannot; a whole pair stays."""
    text = r"""{"file_name": "a.png", "text": "one \ud83d"}
{"file_name": "b.png", "text": "two \ud83d\ude00"}"""
    write(tmp_path / "metadata.jsonl", text)
    images = ImageFolder(tmp_path)
    assert [images[0].caption, images[1].caption] == ["one \ufffd", "two \U0001f600"]


@pytest.mark.parametrize("name", [r"\ud83d.png", r"a\u0000.png", "/etc/a.png"])
def test_a_file_name_that_no_folder_can_hold_is_named(tmp_path, name):
    write(tmp_path / "metadata.jsonl", f'{{"file_name": "{name}", "text": "x"}}')
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1: file_name .* no relative path"):
        ImageFolder(tmp_path)[0]


def test_nesting_that_python_cannot_follow_is_no_json(tmp_path):
    write(tmp_path / "metadata.jsonl", line("a.png", text="x") + "\n" + "[" * 100_000)
    with pytest.raises(DataError, match=r"line 2 is not JSON .*nested too deeply"):
        ImageFolder(tmp_path)[1]
