"""What a command loads: counted in sys.modules of a fresh process, not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (  # each takes from a tenth of a second to seconds
    "accelerate", "datasets", "diffusers", "huggingface_hub", "matplotlib", "numpy", "onnx",
    "onnxruntime", "onnxscript", "peft", "PIL", "pyarrow", "safetensors", "sympy", "tokenizers",
    "torch", "torch._dynamo", "torch._inductor", "torchao", "transformers", "triton",
)  # fmt: skip
TORCH = {"numpy", "safetensors", "torch"}  # numpy is loaded by torch

RUN = """
import json, sys
from pixart_rt.cli import main
code = main(sys.argv[2:])
seen = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
print("SEEN", code, json.dumps(seen), file=sys.stderr)
"""


def loaded(program: str, *words: object) -> tuple[int, set[str]]:
    """The exit code of a program in a process of its own, and which of HEAVY it loaded."""
    command = [sys.executable, "-c", program, json.dumps(HEAVY), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    _, code, seen = done.stderr.splitlines()[-1].split(" ", 2)
    return int(code), set(json.loads(seen))


def test_inspect_and_help_load_nothing_heavy(hollow_bundle: Path) -> None:
    assert loaded(RUN, "inspect", hollow_bundle) == (0, set())
    assert loaded(RUN, "finetune", "lora", "--help") == (0, set())


def test_doctor_loads_torch_and_the_engines_it_asks() -> None:
    code, seen = loaded(RUN, "doctor", "--json")
    assert code == 0
    assert seen <= {"numpy", "onnxruntime", "torch"}


def test_a_build_that_is_there_already_loads_torch_alone(tmp_path: Path) -> None:
    words = ("build", "--model", "tiny", "--res", 256, "--backend", "torch", "--components", "vae",
             "--out", tmp_path / "bundle")  # fmt: skip
    assert "diffusers" in loaded(RUN, *words)[1], "the build itself needs them"
    code, seen = loaded(RUN, *words)
    assert code == 0
    assert seen <= TORCH | {"triton"}, "triton defines the kernels of the model's own modules"


def test_the_pipeline_loads_neither_diffusers_nor_transformers() -> None:
    program = RUN.replace("main(sys.argv[2:])", "0").replace(
        "from pixart_rt.cli import main", "from pixart_rt import PixArtPipeline"
    )
    assert loaded(program)[1] <= TORCH | {"triton", "PIL"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("finetune", "lora", "nosuch", "--out", "x", "--prompt", "a star"), 1),
        (("finetune", "dreambooth", "nosuch", "--out", "x"), 1),
        (("finetune", "lora", ".", "--out", "x", "--class-images", "nosuch"), 1),
        (("finetune", "lcm", "nosuch", "--out", "x"), 1),
        (("finetune", "controlnet", ".", "nosuch", "--out", "x"), 1),
        (("data", "extract", "nothere", "features"), 1),
        (("data", "edges", "nothere", "edges"), 1),
        (("merge", "tiny", "adapter", "adapter"), 2),
        (("convert", "adapter", "adapter/mine.txt"), 2),
        (("build", "--model", "tiny", "--max-memory", "inf"), 2),
        (("train", "nosuch", "--out", "x"), 2),
    ],
)
def test_cheap_mistakes_are_found_before_torch_is_loaded(
    words: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert loaded(RUN, *words) == (code, set())
