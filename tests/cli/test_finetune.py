"""`pixart-rt finetune`: from a folder of pictures to a model that build takes, on tiny."""

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

from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.lora import sampled_sha256
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.training.trainer import Trainer

PROMPT = "a photo of sks circle"
SIZES = [(256, 256), (130, 260), (300, 300)]


def paint(folder: Path, seed: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    return paint(tmp_path / "dog", 0)


def words(verb: str, images: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("finetune", verb, images, "--model", "tiny", "--res", 256, "--out", out, "--steps", 3,
            "--device", "cpu", *more)  # fmt: skip


def test_a_lora_is_trained_and_merged(run: Callable[..., Any], dog: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "lora", tmp_path / "merged"
    outcome = run(*words("lora", dog, out, "--prompt", PROMPT, "--rank", 4, "--batch", 2))
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dog", "lora", "lora.run"]
    assert sorted(each.name for each in (tmp_path / "lora.run").iterdir()) == [".lock", "log.jsonl"]
    lines = (tmp_path / "lora.run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "step 3/3  loss 0." in outcome.err
    origin = json.loads((out / "origin.json").read_text())
    assert (origin["prompt"], origin["lora"]["rank"]) == (PROMPT, 4)
    assert origin["base_config"]["sample_size"] == 32 and origin["resolution"] == 256
    assert origin["base_sha256"] == sampled_sha256(read_transformer(TINY / "transformer_256").state)
    learned = load_file(out / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in learned.items() if "lora_B" in name)
    assert run("merge", "tiny", out, merged, "--res", 256).code == 0
    checkpoint = read_transformer(merged)
    base = read_transformer(TINY / "transformer_256").state
    changed = {n for n, t in checkpoint.state.items() if not torch.equal(t, base[n].float())}
    assert changed == {name for name in base if name.endswith("weight") and "attn." in name}
    again = run(*words("lora", dog, out, "--prompt", PROMPT))
    assert "--force" in again.error


def test_the_same_command_gives_the_same_adapter(
    run: Callable[..., Any], dog: Path, tmp_path: Path
) -> None:
    found = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        assert (
            run(*words("lora", dog, tmp_path / name, "--prompt", PROMPT, "--seed", seed)).code == 0
        )
        found.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_run_that_was_stopped_goes_on(
    run: Callable[..., Any], dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the result is written: its checkpoint is the last step's."""
    from pixart_rt.training.finetune import lora

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    out, asked = tmp_path / "lora", ("--prompt", PROMPT)
    with monkeypatch.context() as patched:
        patched.setattr(lora, "write_adapter", stopped)
        assert run(*words("lora", dog, out, *asked)).code == 130
    assert not out.exists()
    other = run(*words("lora", dog, out, "--prompt", "another"))
    assert other.code == 1
    assert "was made with asked" in other.error
    steps: list[int] = []
    walk = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, batch: steps.append(self.done) or walk(self, batch)
    )
    assert run(*words("lora", dog, out, *asked)).code == 0
    assert steps == [], "all steps were done"
    assert not (tmp_path / "lora.run" / "checkpoints").exists()


def test_dreambooth_with_class_pictures_makes_a_pipeline(
    run: Callable[..., Any], dog: Path, tmp_path: Path
) -> None:
    animals, out = paint(tmp_path / "class", 1), tmp_path / "model"
    asked = ("--prompt", PROMPT, "--class-images", animals, "--class-prompt", "a circle")
    outcome = run(*words("dreambooth", dog, out, *asked, "--freeze-captions", "--lr", 1e-4))
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    checkpoint, base = read_transformer(out), read_transformer(TINY / "transformer_256")
    assert checkpoint.config == base.config
    for name, tensor in base.state.items():
        frozen = name.startswith("y_proj")
        assert torch.equal(checkpoint.state[name], tensor.float()) == frozen, name
    assert (out / "text_encoder").is_dir()
    assert (
        json.loads((out / "transformer" / "origin.json").read_text())["class_prompt"] == "a circle"
    )


def test_captions_of_a_metadata_file(run: Callable[..., Any], dog: Path, tmp_path: Path) -> None:
    lines = [{"file_name": f"{n}.png", "text": f"squares, number {n}"} for n in range(3)]
    (dog / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(*words("lora", dog, tmp_path / "style", "--text-dropout", 0.5)).code == 0


def test_one_line_for_what_cannot_be(run: Callable[..., Any], dog: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more, reason in (
        ((), "metadata.jsonl"),
        (("--prompt", PROMPT, "--class-images", dog), "go together"),
        (("--prompt", PROMPT, "--rank", 0), "rank of a LoRA"),
        (("--prompt", PROMPT, "--lr", 0), "lr must be > 0"),
        (
            ("--prompt", PROMPT, "--batch", 3, "--micro-batches", 2),
            "--micro-batches 2 was requested, but a step of 3 images",
        ),
        (("--prompt", PROMPT, "--res", 512), "is a 1024 px model"),
    ):
        assert reason in run(*words("lora", dog, out, *more)).error
    assert "is no folder" in run(*words("lora", tmp_path / "x", out, "--prompt", PROMPT)).error
    assert [each.name for each in tmp_path.iterdir()] == ["dog"]


@pytest.mark.slow
def test_from_pictures_to_an_engine(run: Callable[..., Any], dog: Path, tmp_path: Path) -> None:
    """The commands of docs/training.md, with tiny: what was learned changes the image."""
    assert run(*words("lora", dog, tmp_path / "lora", "--prompt", PROMPT, "--lr", 1e-2)).code == 0
    assert run("merge", "tiny", tmp_path / "lora", tmp_path / "model", "--res", 256).code == 0
    drawn = []
    for name, model in (("plain", "tiny"), ("merged", tmp_path / "model")):
        bundle, image = tmp_path / f"{name}-engines", tmp_path / f"{name}.png"
        built = run("build", "--model", model, "--res", 256, "--backend", "torch", "--out", bundle)
        assert built.code == 0, built.err
        assert run("generate", PROMPT, "--bundle", bundle, "-o", image, "--steps", 4).code == 0
        drawn.append(np.asarray(Image.open(image)).astype(float))
    assert np.abs(drawn[0] - drawn[1]).mean() > 5  # of 255
