"""The shipped checkpoint loads unchanged in diffusers, and the scripts that made it still run."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tiny import export, loss_curve, tokenizer, train_text, train_vae
from pixart_rt.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "pixart_rt" / "assets" / "tiny"
MAX_BYTES = 25_000_000
PROMPTS = ["a red circle above a blue square", "", "Hello, world? 12 #"]


def test_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MAX_BYTES


def test_tokenizer_ids_equal_sentencepiece():
    import sentencepiece
    from transformers import T5Tokenizer

    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(ASSETS / "tokenizer" / "spiece.model")
    )
    tokenizer = T5Tokenizer.from_pretrained(ASSETS / "tokenizer")
    for prompt in PROMPTS:
        assert tokenizer(prompt).input_ids == [*pieces.encode(prompt), pieces.eos_id()]
    assert 2 not in tokenizer(PROMPTS[0]).input_ids  # no <unk>


def test_pipeline_loads_and_draws():
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    pipeline = PixArtAlphaPipeline.from_pretrained(ASSETS)
    config = pipeline.transformer.config
    assert (config.sample_size, config.interpolation_scale, config.out_channels) == (128, 4, 8)
    assert pipeline.transformer.adaln_single.emb.use_additional_conditions
    square = PixArtTransformer2DModel.from_pretrained(ASSETS, subfolder="transformer_256")
    assert square.config.sample_size == 32 and not square.adaln_single.emb.use_additional_conditions
    pipeline = PixArtAlphaPipeline.from_pretrained(ASSETS, transformer=square)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPTS[0],
        height=256,
        width=256,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        clean_caption=False,
        output_type="np",
    ).images[0]
    assert image.shape == (256, 256, 3) and np.isfinite(image).all()
    border = np.median(np.concatenate([image[0], image[-1]]), axis=0)
    assert border.min() > 0.85 and image.std() > 0.05  # something on white


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer, a VAE and a text encoder by their scripts, after a step each."""
    root, seconds = tmp_path_factory.mktemp("tiny"), "0.001"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "STANDARDIZED", 8)
        patch.setattr(train_vae, "CROPS", ((2, 64),) * 2)
        patch.setattr(train_vae, "WHOLE", ((1, 64),) * 2)
        patch.setattr(train_text, "BATCH", 4)
        patch.setattr(tokenizer, "CAPTIONS", 2000)
        threads = ("--threads", "1")
        tokenizer.main(["--out", f"{root}/tokenizer"])
        train_vae.main(["--out", f"{root}/vae", "--minutes", seconds, *threads])
        train_text.main(["--tokenizer", f"{root}/tokenizer", "--out", f"{root}/text_encoder",
                         "--minutes", seconds, *threads])  # fmt: skip
    return root


@pytest.mark.slow
def test_the_training_scripts_run(parts, capsys):
    """What they leave goes into a folder that exports again to the same; the recipe is tested in
    test_recipe.py."""
    for phase, folder in (("05-aesthetics-1024", "transformer"),
                          ("03-aesthetics-256", "transformer_256")):  # fmt: skip
        shutil.copytree(ASSETS / folder, parts / phase / "transformer-ema")
        log = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        (parts / phase / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    out = parts / "assets"
    export.main(["--root", str(parts), "--run", str(parts), "--out", str(out)])
    assert (out / "model_index.json").exists()
    once = (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    export.main(["--root", str(out), "--run", str(parts), "--out", str(out), "--force"])
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == once
    loss_curve.main([str(parts), "--out", str(parts / "loss.png")])
    assert (parts / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_a_script_is_run_as_a_module_and_says_its_error_in_a_line(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    words = ["-m", "examples.tiny.export", "--run", "nowhere", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr  # what libraries say of each other comes before
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} exists and is not")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_make_tiny_runs_commands_that_are_there():
    """`make -n` prints them: the scripts are ours, the training gets what the first one made."""
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "tiny", "TINY=somewhere"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.replace("\\\n", " ").splitlines()
    modules = [match[1] for line in lines if (match := re.search(r" -m (\S+)", line))]
    assert modules[0] == "examples.tiny.data" and len(modules) == 5
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    training = next(line for line in lines if "pixart-rt train" in line)
    names = set(re.findall(r"--data '(\S+)=somewhere/data/features/\1-\{res\}'", training))
    assert names == {phase.data for phase in read_recipe(ROOT / "recipes" / "tiny.toml").phases}


def test_the_benchmark_covers_five_aspect_ratios(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.score_tiny")
    assert len({h / w for h, w in module.SIZES[1024]}) >= 5
