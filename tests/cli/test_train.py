"""`pixart-rt train`: from pictures to a transformer, stopped and gone on with, and mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pixart_rt.model.checkpoint import read_transformer

RECIPE = """
preset = "paper"
ema_decay = 0.9

[model]
num_layers = 2
num_heads = 2
caption_channels = 128
max_text_tokens = 120

[[phases]]
name = "text"
stage = "text-image-alignment"
start = "random"
resolution = 256
data = "noise"
num_images = 4
steps = 3
batch_per_gpu = 2
num_gpus = 1
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(4):
        pixels = rng.integers(0, 256, (256, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"noise number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_from_a_store_to_a_transformer(run, recipe, images, tmp_path):
    store, out = tmp_path / "noise-256", tmp_path / "run"
    run("data", "extract", images, store, "--model", "tiny", "--square", "--device", "cpu")
    words = ("train", recipe, "--out", out, "--data", f"noise={tmp_path}/noise-{{res}}",
             "--device", "cpu", "--workers", 0, "--log-every", 1, "--save-every", 1)  # fmt: skip
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == str(out / "01-text" / "transformer-ema")
    assert "lr 0.001" in outcome.err and "step 3/3" in outcome.err
    trained = read_transformer(out / "01-text" / "transformer-ema")
    assert trained.config.sample_size == 32 and trained.config.caption_channels == 128
    lines = (out / "01-text" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    again = run(*words)
    assert again.code == 0 and "phase text is done" in again.err
    replayed = run(*words, "--phase", "text", "--replay", 2)
    assert replayed.code == 0, replayed.err
    report = json.loads(replayed.out)
    assert report["step"] == 2 and report["finite"]
    assert np.mean(report["ranks"][0]["loss"]) == pytest.approx(
        json.loads(lines[2])["loss"], rel=1e-6
    )


def test_pictures_encoded_on_the_way(run, recipe, images, tmp_path):
    words = ("train", recipe, "--out", tmp_path / "run", "--data", f"noise={images}",
             "--device", "cpu", "--workers", 0, "--steps", 1)  # fmt: skip
    refused = run(*words)
    assert refused.code == 2 and "--encoder" in refused.error
    outcome = run(*words, "--encoder", "tiny")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("more, says", [
    ((), "--data noise=PATH"),
    (("--data", "noise"), "NAME=PATH"),
    (("--data", "nose=x"), "names no data of the recipe"),
    (("--phase", "texts"), "it has text"),
    (("--replay", "1", "--data", "noise=x"), "no feature store"),
    (("--data", "noise=x", "--log", "paper"), "choose from console"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(run, recipe, tmp_path, more, says):
    outcome = run("train", recipe, "--out", tmp_path / "run", "--device", "cpu", *more)
    assert outcome.code == 2 and says in outcome.error
