"""`pixart-rt train`: from pictures to a transformer, stopped and resumed, and mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.training.validation import Validation, ValidationSettings

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
             "--device", "cpu", "--workers", 2, "--log-every", 1, "--save-every", 1)  # fmt: skip
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


def test_validation_images_are_drawn_by_the_averages(run, recipe, images, tmp_path):
    """The grid of the last step is what the phase's own weights draw; the one before differs."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red circle above a blue square\n\ntwo green stars\n")
    outcome = run("train", recipe, "--out", out, "--data", f"noise={images}", "--encoder", "tiny",
                  "--device", "cpu", "--workers", 0, "--steps", 2, "--validate-with", "tiny",
                  "--validate-every", 1, "--prompts", prompts)  # fmt: skip
    assert outcome.code == 0, outcome.err
    grids = [out / "01-text" / "validation" / f"step-{step}.png" for step in (1, 2)]
    assert all(str(grid) in outcome.err.replace("\n", "") for grid in grids)
    pixels = [np.asarray(Image.open(grid)) for grid in grids]
    assert min(pixels[0].shape[:2]) >= 256 and max(pixels[0].shape[:2]) >= 512  # two images
    assert pixels[0].std() > 0 and not np.array_equal(*pixels)
    trained = load_transformer(read_transformer(out / "01-text" / "transformer-ema"))
    asked = ValidationSettings(prompts=("a red circle above a blue square", "two green stars"))
    again = Validation("tiny", trained.config, asked, torch.device("cpu"))(trained, tmp_path, 2)
    assert np.array_equal(np.asarray(Image.open(again)), pixels[1])


@pytest.mark.parametrize("more, code, says", [
    (("--pipeline", "nosuch"), 1, "nosuch"),
    (("--pipeline", "images"), 1, "--pipeline images was requested, but it has no vae"),
    (("--encoder", "images"), 1, "--encoder images was requested, but it has no vae"),
    (("--validate-with", "images", "--validate-every", 1, "--prompts", "p.txt"), 1,
     "--validate-with images was requested, but it has no vae"),
    (("--data", "noise=p.txt"), 2, "is no feature store and no folder"),
    (("--out", "p.txt"), 2, "p.txt is a file"),
    (("--out", "/proc/run"), 2, "takes no new files"),
    (("--out", "mine"), 2, "not a transformer folder that pixart-rt wrote"),
    (("--out", "mine", "--pipeline", "tiny"), 2, "not a pipeline folder that pixart-rt wrote"),
])  # fmt: skip
def test_places_are_checked_before_any_step(
    run, recipe, images, tmp_path, monkeypatch, more, code, says
):
    """A run of days must not end on a name that was wrong from the start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a circle\n")
    (tmp_path / "mine" / "pipeline").mkdir(parents=True)
    (tmp_path / "mine" / "pipeline" / "notes").write_text("mine")
    (tmp_path / "mine" / "01-text" / "transformer-ema").mkdir(parents=True)
    (tmp_path / "mine" / "01-text" / "transformer-ema" / "config.json").write_text("mine")
    usual = ("--out", "run", "--data", f"noise={images}", "--encoder", "tiny", "--device", "cpu")
    outcome = run("train", recipe, *usual, *more)
    assert outcome.code == code and says in outcome.error
    assert "phase" not in outcome.err.partition("error:")[0] and not (tmp_path / "run").exists()
    assert (tmp_path / "mine" / "pipeline" / "notes").read_text() == "mine"


VALIDATE = ("--data", "noise=.", "--validate-with", "tiny", "--validate-every", 5)


@pytest.mark.parametrize("more, says", [
    (VALIDATE, "requested without --prompts"),
    (("--data", "noise=x", "--prompts", "x"), "without --validate-with and --validate-every"),
    ((*VALIDATE, "--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
])  # fmt: skip
def test_validation_images_need_all_three(run, recipe, tmp_path, more, says):
    outcome = run("train", recipe, "--out", tmp_path / "run", "--device", "cpu", *more)
    assert outcome.code == 2 and says in outcome.error
    assert not (tmp_path / "run").exists()


def test_a_dit_draws_no_validation_images(run, recipe, tmp_path):
    recipe.write_text(RECIPE.replace("text-image-alignment", "pixel-dependency"))
    outcome = run("train", recipe, "--out", tmp_path / "run", *VALIDATE, "--prompts", recipe)
    assert outcome.code == 2 and "no text phase is run" in outcome.error


def test_from_pictures_to_an_image_by_an_engine(run, recipe, images, tmp_path, no_kernels):
    """The commands of docs/own-images.md, with tiny: the weights in the bundle are trained."""
    store, out, engines = tmp_path / "features", tmp_path / "run", tmp_path / "engines"
    pipeline, image = out / "pipeline", tmp_path / "image.png"
    text = RECIPE.replace('"random"', '"previous"').replace("num_layers = 2", "num_layers = 8")
    recipe.write_text(text)
    on_cpu = ("--device", "cpu")
    for *words, printed in (
        ("data", "extract", images, store, "--model", "tiny", "--square", *on_cpu, store),
        ("train", recipe, "--out", out, "--data", f"noise={store}", "--init", "tiny", "--pipeline",
         "tiny", "--workers", 0, "--steps", 2, *on_cpu, pipeline),
        ("build", "--model", pipeline, "--res", 256, "--backend", "torch", "--out", engines,
         engines),
        ("generate", "a red circle", "--bundle", engines, "--steps", 2, "-o", image, image),
    ):  # fmt: skip
        outcome = run(*words)
        assert outcome.code == 0, outcome.err
        assert str(printed) in outcome.out
    trained = read_transformer(pipeline)
    average, start = (
        read_transformer(out / "01-text" / "transformer-ema"),
        read_transformer(TINY / "transformer_256"),
    )
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(trained.state[name], average.state[name])
    assert 0 < (trained.state[name] - start.state[name]).abs().max() < 0.01
    with Image.open(image) as made:
        assert made.size == (256, 256)


def test_a_whole_pipeline_is_of_a_text_phase(run, recipe, tmp_path):
    recipe.write_text(RECIPE.replace("text-image-alignment", "pixel-dependency"))
    words = ("train", recipe, "--out", tmp_path / "run", "--data", "noise=x")
    outcome = run(*words, "--pipeline", "tiny")
    assert outcome.code == 2 and "the last phase is text, of classes" in outcome.error
