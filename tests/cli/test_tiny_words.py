"""The words that the tiny model knows: the asset, prompts of our own texts, the warning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.tiny.scenes import caption, random_scene, vocabulary
from pixart_rt.bundle import MANIFEST, Manifest
from pixart_rt.checkpoints.hub import TINY, VOCABULARY, unseen_words

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "pixart_rt" / "cli").glob("*.py"))]  # fmt: skip


def test_the_asset_has_the_words_of_the_scenes() -> None:
    assert (TINY / VOCABULARY).read_text(encoding="utf-8").split() == vocabulary()


def test_every_caption_is_in_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    texts = " ".join(caption(random_scene(rng), rng) for _ in range(2000))
    assert unseen_words("tiny", texts) == []
    assert set(re.findall(r"\w+", texts)) == set(vocabulary())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("A Red circle, above a BLUE square!", []),
        ("two green stars and a dog's well-kept kennel, a dog",
         ["two", "stars", "dog's", "well-kept", "kennel", "dog"]),
        ("ein Kreis — été", ["ein", "kreis", "été"]),
    ],
)  # fmt: skip
def test_unseen_words(text: str, words: list[str]) -> None:
    assert unseen_words("tiny", text) == words
    assert unseen_words("PixArt-alpha/PixArt-XL-2-1024-MS", text) == []


def test_prompts_of_our_texts_for_tiny_are_in_the_vocabulary() -> None:
    found = []
    for path in TEXTS:
        found += re.findall(r'generate "([^"]+)" --bundle \S*tiny', path.read_text("utf-8"))
    assert len(found) >= 5
    assert [word for text in found for word in unseen_words("tiny", text)] == []


def test_generate_names_words_that_tiny_has_never_seen(
    run: Callable[..., Any], hollow_bundle: Path, tmp_path: Path
) -> None:
    """And then continues, to the engines that this bundle lacks."""
    manifest = replace(Manifest.read(hollow_bundle), model={"name": "tiny", "sha256": "0"})
    (hollow_bundle / MANIFEST).write_text(manifest.to_json())
    words = ["generate", "a red dog", "--bundle", hollow_bundle, "-o", tmp_path / "o.png"]
    assert "tiny has never seen dog; it knows" in run(*words).err
    assert "never seen" not in run("generate", "a red star", *words[2:]).err
