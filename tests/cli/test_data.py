"""`pixart-rt data`: from a folder to a store, plans, and one line for every mistake."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from pixart_rt.data.store import FeatureStore

RATES = {"vae_per_second": 100, "text_per_second": 25, "read_per_second": 200,
         "write_bytes_per_second": 1e6, "bytes_per_image": 1e4, "resolution": 256}  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """Three noise pictures with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number, (height, width) in enumerate([(64, 64), (40, 90), (70, 33)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "caption": "a red circle"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_from_a_folder_to_a_store(run, images, tmp_path):
    words = ("data", "extract", images, tmp_path / "out", "--model", "tiny", "--caption-column",
             "caption", "--device", "cpu", "--shard-images", 2)  # fmt: skip
    outcome = run(*words)
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "out"))
    for line in ("images: 3; 2 shards", "measured on 3 images", "shard 2 of 2"):
        assert line in outcome.err, "the plan comes first, then progress"
    assert len(FeatureStore(tmp_path / "out")) == 3
    again = run(*words, "--json")
    assert json.loads(again.out)["num_samples"] == 3
    assert "measuring" not in again.err, "nothing is left to plan"


def test_from_a_folder_to_its_edges_and_their_store(run, images, tmp_path):
    (images / "1.png").write_bytes(b"no picture")
    outcome = run("data", "edges", images, tmp_path / "edges", "--caption-column", "caption")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "edges"))
    assert "1 images cannot be read" in outcome.err
    outcome = run("data", "extract", tmp_path / "edges", tmp_path / "out", "--model", "tiny",
                  "--device", "cpu")  # fmt: skip
    assert outcome.code == 0
    assert FeatureStore(tmp_path / "out").sources.tolist() == [0, 2]
    refused = run("data", "edges", images, tmp_path / "edges", "--kind", "sobel")
    assert refused.code == 2 and "choose one of canny, hed" in refused.err


def test_a_plan_only(run, images, tmp_path):
    outcome = run("data", "extract", images, tmp_path / "out", "--model", "tiny", "--res", "512",
                  "--caption-column", "caption", "--plan-only", "--json")  # fmt: skip
    assert outcome.code == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "rates.json").write_text(outcome.out)
    decided = run("data", "plan", "--images", "1e6", "--epochs", 100, "--res", "512", "--rates",
                  tmp_path / "rates.json", "--json")  # fmt: skip
    decision = json.loads(decided.out)
    assert decision["choice"] == "store"
    bytes_per_image = json.loads(outcome.out)["bytes_per_image"]
    assert decision["store_bytes"] == pytest.approx(1e6 * bytes_per_image)
    assert decision["online_flops"] == pytest.approx(100 * decision["store_flops"])


@pytest.mark.parametrize(("epochs", "choice"), [("0.44", "online"), ("171", "store")])
def test_plan_prints_the_choice_and_shows_the_arithmetic(run, tmp_path, epochs, choice):
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    outcome = run("data", "plan", "--images", "14e6", "--epochs", epochs, "--rates",
                  tmp_path / "rates.json")  # fmt: skip
    assert (outcome.code, outcome.out) == (0, choice + "\n")
    assert "equal at 1.2 epochs" in outcome.err


def test_options_go_before_the_file(run, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    outcome = run("data", "plan", "--images", "3600", "--epochs", 2, "--rates",
                  tmp_path / "rates.json", "--write-rate", 0.1, "--json")  # fmt: skip
    assert json.loads(outcome.out)["write_hours"] == pytest.approx(0.1)


def test_skipped_images_are_a_warning(run, images, tmp_path):
    (images / "1.png").write_bytes(b"x")
    outcome = run("data", "extract", images, tmp_path / "out", "--model", "tiny",
                  "--caption-column", "caption")  # fmt: skip
    assert outcome.code == 0
    assert "warning: 1 images were skipped" in outcome.err


def test_mistakes_are_one_line(run, images, tmp_path):
    out = tmp_path / "out"
    for code, said, words in (
        (1, "no text column 'text', it has caption", (images, out)),
        (1, "is no folder", (tmp_path / "none", out)),
        (2, "choose one of 256, 512, 1024, multi", (images, out, "--res", "768")),
        (2, "--device 'quantum' cannot be used", (images, out, "--caption-column", "caption",
                                                  "--model", "tiny", "--device", "quantum")),
        (1, "is no file or folder here", (images, out, "--caption-column", "caption",
                                          "--model", "./none")),
        (2, "shard_images must be positive", (images, out, "--shard-images", "0")),
        (2, "--max-text-tokens 0", (images, out, "--max-text-tokens", "0")),
    ):  # fmt: skip
        outcome = run("data", "extract", *words)
        assert outcome.code == code, outcome.err
        assert said in outcome.error
        assert not out.exists()


def test_a_plan_without_rates_is_refused(run, tmp_path):
    outcome = run("data", "plan", "--images", 10, "--epochs", 1, "--vae-rate", 5)
    assert outcome.code == 2
    assert outcome.error.startswith("text_per_second, read_per_second, write_bytes_per_second")
    (tmp_path / "r.json").write_text("[]")
    plan = ("data", "plan", "--images", 10, "--epochs", 1, "--rates", tmp_path / "r.json")
    assert "is not what" in run(*plan).error
    (tmp_path / "r.json").write_text(json.dumps(RATES))
    assert "measured at 256 pixels" in run(*plan, "--res", "multi").error


def test_without_the_extra_one_line_says_so(run, images, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "pyarrow" or name.startswith("pixart_rt.data"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = run("data", "extract", images, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error == (
        "the Python package pyarrow is not installed; run `pip install 'pixart_rt[data]'`"
    )


def test_subfolders_are_classes_where_nothing_says_otherwise(run, images, tmp_path):
    for name, number in (("dogs", 0), ("cats", 1)):
        (images / name).mkdir()
        (images / f"{number}.png").rename(images / name / "a.png")
    words = ("data", "extract", images, "--model", "tiny", "--device", "cpu")
    (images / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    outcome = run(*words, tmp_path / "one")
    assert outcome.code == 0
    assert "2 subfolders are classes (there is no metadata.jsonl): labels" in outcome.err
    assert FeatureStore(tmp_path / "one").labels.tolist() == [0, 1]
    assert FeatureStore(tmp_path / "one").classes == ("cats", "dogs")
    (tmp_path / "metadata.jsonl").rename(images / "metadata.jsonl")
    outcome = run(*words, tmp_path / "two", "--classes")
    assert outcome.code == 0 and "are classes (--classes)" in outcome.err
    assert FeatureStore(tmp_path / "two").labels.tolist() == [0, 1]
    outcome = run(*words, tmp_path / "three")
    assert outcome.code == 1 and "no text column 'text'" in outcome.err
