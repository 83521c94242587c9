"""The shipped checkpoint loads unchanged in diffusers, and the scripts that made it still run."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.slow
def test_the_training_scripts_run(tmp_path):
    """Every script for a second or two; the recipe is tested in test_tiny_recipe.py."""
    root, seconds = tmp_path / "tiny", "0.01"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}

    def run(script: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"pixart_rt.training.tiny.{script}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    run("tokenizer", "--out", f"{root}/tokenizer")
    run("train_vae", "--out", f"{root}/vae", "--minutes", seconds)
    run("train_text", "--tokenizer", f"{root}/tokenizer", "--out", f"{root}/text_encoder",
        "--minutes", seconds)  # fmt: skip
    for phase, folder in (("05-aesthetics-1024", "transformer"),
                          ("03-aesthetics-256", "transformer_256")):  # fmt: skip
        shutil.copytree(ASSETS / folder, root / phase / "transformer-ema")
        log = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        (root / phase / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    out = root / "assets"
    run("export", "--root", str(root), "--run", str(root), "--out", str(out))
    assert (out / "model_index.json").exists()
    once = (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    itself = ("--root", str(out), "--run", str(root), "--out", str(out))
    run("export", *itself, "--force")
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == once
    run("loss_curve", str(root), "--out", str(root / "loss.png"))
    assert (root / "loss.png").stat().st_size > 0


def test_the_benchmark_covers_five_aspect_ratios(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.score_tiny")
    assert len({h / w for h, w in module.SIZES[1024]}) >= 5
