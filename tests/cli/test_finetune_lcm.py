"""`pixart-rt finetune lcm`: a store or pictures into a student that samples with lcm, on tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_rt import PixArtPipeline
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import TransformerCheckpoint, read_transformer
from pixart_rt.config import EngineConfig
from pixart_rt.export.build import build

pytestmark = pytest.mark.usefixtures("no_kernels")
SIZES = [(64, 64), (40, 90), (64, 64), (40, 90)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pictures of two shapes, with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def store(run: Callable[..., Any], images: Path, tmp_path: Path) -> Path:
    out = tmp_path / "features"
    assert run("data", "extract", images, out, "--model", "tiny", "--device", "cpu").code == 0
    return out


def words(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("finetune", "lcm", data, "--model", "tiny", "--res", 256, "--out", out, "--steps", 2,
            "--batch", 2, "--lr", 1e-3, "--device", "cpu", "--workers", 0, *more)  # fmt: skip


def base() -> TransformerCheckpoint:
    return read_transformer(TINY / "transformer_256")


def timesteps(folder: Path, out: Path) -> list[int]:
    """Those of an image where nothing is asked of a bundle of the folder."""
    bundle = build(str(folder), out, EngineConfig(resolution=256, backend="torch"))
    assert bundle.manifest.scheduler == "lcm"
    found: list[int] = []
    pipe = PixArtPipeline.from_bundle(bundle.path, "cpu")
    latents = pipe(
        "a red circle", output_type="latent",
        callback_on_step_end=lambda _p, _s, timestep, _v: found.append(int(timestep)),
    ).images  # fmt: skip
    assert latents.isfinite().all()
    return found


def test_a_student_is_trained_and_samples_with_lcm(
    run: Callable[..., Any], store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    outcome = run(*words(store, out))
    assert (outcome.code, outcome.out) == (0, f"{out}\n"), outcome.err
    student, teacher = read_transformer(out), base()
    assert student.config == teacher.config
    for name in ("x_embedder.weight", "blocks.7.mlp.fc2.weight", "y_proj.fc1.weight"):
        assert not torch.equal(student.state[name], teacher.state[name].float()), name
    assert student.origin is not None and student.origin["lcm"]["guidance_w"] == 4.5
    assert not (tmp_path / "student.run" / "checkpoints").exists()
    assert len((tmp_path / "student.run" / "log.jsonl").read_text().splitlines()) == 2
    assert timesteps(out, tmp_path / "bundle") == [999, 759, 499, 259]
    assert "--force" in run(*words(store, out)).error


def test_an_adapter_is_trained_and_merged_into_a_student(
    run: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    """From pictures that are encoded in every step, read by a worker."""
    pytest.importorskip("peft")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    outcome = run(*words(images, adapter, "--lora", "--rank", 4, "--workers", 1))
    assert outcome.code == 0, outcome.err
    origin = json.loads((adapter / "origin.json").read_text())
    assert (origin["scheduler"], origin["lora"]["alpha"]) == ("lcm", 4)
    learned = load_file(adapter / "adapter_model.safetensors")
    assert all(bool(each.any()) for name, each in learned.items() if "lora_B" in name)
    assert run("merge", "tiny", adapter, merged, "--res", 256).code == 0
    assert timesteps(merged, tmp_path / "bundle") == [999, 759, 499, 259]
    alone = run("merge", "tiny", adapter, tmp_path / "t", "--res", 256, "--transformer-only")
    assert alone.code == 0 and "sample it with lcm" in alone.err


def test_other_adapters_are_an_lcms_where_that_is_asked(
    run: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    assert run(*words(images, adapter, "--lora", "--rank", 2, "--steps", 1)).code == 0
    (adapter / "origin.json").unlink()  # as trained elsewhere
    for name, more in (("plain", ()), ("lcm", ("--lcm",))):
        assert run("merge", "tiny", adapter, tmp_path / name, "--res", 256, *more).code == 0
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert (index["scheduler"][1] == "LCMScheduler") == (name == "lcm")
    (adapter / "origin.json").write_text('{"scheduler": "quick"}')
    assert "origin.json is damaged" in run("merge", "tiny", adapter, tmp_path / "x").error


def test_a_run_that_was_stopped_goes_on(
    run: Callable[..., Any], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the student is written: nothing is at OUT, and the same command ends it."""
    from pixart_rt.training.finetune import lcm

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert run(*words(store, whole)).code == 0
    with monkeypatch.context() as patched:
        patched.setattr(lcm, "use_lcm_scheduler", stopped)
        assert run(*words(store, out)).code == 130
    assert not out.exists()
    assert "was made with asked" in run(*words(store, out, "--guidance-w", 3.0)).error
    assert run(*words(store, out)).code == 0
    expected = read_transformer(whole).state
    for name, tensor in read_transformer(out).state.items():
        assert torch.equal(tensor, expected[name]), name


def test_what_cannot_be_is_refused(
    run: Callable[..., Any], store: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for data, more, reason in (
        (store, ("--rank", 4), "ask for one with --lora"),
        (store, ("--lora", "--parallel", "fsdp"), "use ddp"),
        (store, ("--square",), "--square is for pictures"),
        (store, ("--guidance-w", -1), "guidance_w must be >= 0"),
        (store, ("--batch", 0), "batch must be > 0"),
        (store, ("--res", 1024), "extract them with --res 1024"),
        (store, ("--model", TINY / "transformer_256"), "is no pipeline folder"),
    ):
        assert reason in run(*words(data, out, *more)).error
    assert not out.exists()
