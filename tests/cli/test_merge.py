"""`merge`: a model that build and diffusers read, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load_file

from pixart_rt.bundle import sha256
from pixart_rt.checkpoints.lora import read_adapter
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.training.finetune.lora import add_lora, lora_state, save_lora
from pixart_rt.training.finetune.settings import LoraSettings

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def adapter(pipeline_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the random 256 px pipeline."""
    model = load_transformer(read_transformer(pipeline_folder(32)), torch.float32)
    settings = LoraSettings(rank=2, alpha=2.0)
    add_lora(model, settings)
    random = torch.Generator().manual_seed(0)
    for tensor in lora_state(model).values():
        tensor.normal_(std=0.1, generator=random)
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    save_lora(folder, lora_state(model), settings)
    return folder


def test_a_pipeline_becomes_a_pipeline(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base, out = pipeline_folder(32), tmp_path / "merged"
    outcome = run("merge", base, adapter, out)
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    pipeline = PixArtAlphaPipeline.from_pretrained(out)
    before, after = load_file(base / WEIGHTS), pipeline.transformer.state_dict()
    found = read_adapter(adapter)
    assert len(found.pairs) == 2 * 2 * 4
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        expected = tensor + found.delta(module) if module in found.pairs else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-6)
    assert sha256(out / "vae" / "config.json") == sha256(base / "vae" / "config.json")
    origin = json.loads((out / "transformer" / "origin.json").read_text())
    assert origin["base"] == str(base)
    assert origin["adapter_sha256"] == sha256(adapter / "adapter_model.safetensors")


def test_a_transformer_alone_and_a_pth(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """Both hold what the whole pipeline would; scale 0 is the base."""
    base = pipeline_folder(32)
    folder, pth, again = tmp_path / "transformer", tmp_path / "merged.pth", tmp_path / "again"
    assert run("merge", base, adapter, folder, "--transformer-only").code == 0
    assert run("merge", base, adapter, pth).code == 0
    assert run("merge", pth, adapter, again, "--scale", 0).code == 0
    states = [read_transformer(each).state for each in (folder, pth, again)]
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])
    assert not (folder / "model_index.json").exists()


def test_tiny_has_a_model_for_256(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    """The adapter is another model's: one line, and nothing is written."""
    outcome = run("merge", "tiny", adapter, tmp_path / "merged", "--res", 256)
    assert outcome.code == 1
    assert "does not fit" in outcome.error
    assert "transformer_256" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_model_for_another_resolution_is_refused(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """Its shapes fit: only origin.json tells the models apart."""
    told = tmp_path / "lora"
    shutil.copytree(adapter, told)
    config = read_transformer(pipeline_folder(32)).config
    for size, code in ((config.sample_size, 0), (2 * config.sample_size, 1)):
        base = replace(config, sample_size=size).to_dict()
        (told / "origin.json").write_text(json.dumps({"base_config": base}))
        outcome = run("merge", pipeline_folder(32), told, tmp_path / "merged")
        assert outcome.code == code
        if code:
            assert "a model with sample_size 64, " in outcome.error and "has 32" in outcome.error
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)


def test_what_cannot_be_merged_leaves_nothing(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base, out = pipeline_folder(32), tmp_path / "out"
    assert "is missing" in run("merge", base, tmp_path / "absent", out).error
    assert "--scale nan" in run("merge", base, adapter, out, "--scale", "nan").error
    assert "is a 256 px model" in run("merge", base, adapter, out, "--res", 512).error
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "photo.png").write_bytes(b"mine")
    for force in ((), ("--force",)):
        outcome = run("merge", base, adapter, out, *force)
        assert "not a pipeline folder or a transformer folder" in outcome.error
    assert [path.name for path in out.iterdir()] == ["photo.png"]


def test_force_replaces_a_merged_model(
    run: Callable[..., Any], pipeline_folder: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base, out = pipeline_folder(32), tmp_path / "out"
    assert run("merge", base, adapter, out).code == 0
    first = load_file(out / WEIGHTS)
    assert run("merge", base, adapter, out, "--force", "--scale", 0.5, "--json").code == 0
    second = load_file(out / WEIGHTS)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
