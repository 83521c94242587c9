"""README's commands: each is run as written, or checked without its work, with the reason."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from pixart_rt.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

RUN = {  # in this order, in an empty folder, by a shell that finds pixart-rt
    "pixart-rt build --model tiny --res 256",
    'pixart-rt generate "a red circle above a blue square" --bundle engines/tiny-256 -o out.png',
    "pixart-rt inspect engines/tiny-256",
}
DRY = {  # `make -n`: the rules and the programs that they name exist
    "make demo": "downloads gigabytes; .ci/run runs it",
    "make test": "runs this test",
    'make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"': "as make demo",
}
PARSED = {  # the verb, its options and their values are right
    "pixart-rt build --res 1024": "downloads 22 GB",
    "pixart-rt build --model my-model/ --backend tensorrt-rtx --target sm80": "a folder of yours",
    "pixart-rt bench --model tiny --res 256 --peer diffusers": "minutes; tests/cli/test_bench.py",
    "pixart-rt data extract images/ features/ --res 256": "yours; tests/cli/test_data.py",
    "pixart-rt train pixart-alpha --out run --data ImageNet=in-256 --data SAM-LLaVA=sam-256"
    " --data 'HQ=hq-{res}'": "weeks of GPUs; tests/cli/test_train.py",
    'pixart-rt finetune lora dog/ --prompt "a photo of sks dog" --out dog-lora':
        "downloads 22 GB; tests/cli/test_finetune.py",
}  # fmt: skip
INSTALL = {  # tests/test_packaging.py installs the wheel, which is what pip makes of "."
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install .",
}


def commands(text: str) -> list[str]:
    """The indented lines of a Markdown text, those that end in a backslash joined."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r" *\\\n +", " ", text).splitlines()
    return [line[4:].partition("  #")[0].rstrip() for line in lines if line.startswith("    ")]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_every_command_of_the_readme_is_known_here() -> None:
    found = set(commands(README))
    known = RUN | DRY.keys() | PARSED.keys() | INSTALL
    assert found - known == set(), "run them here, or say why not"
    assert known - found == set(), "README has them no more"


@pytest.mark.parametrize("command", DRY)
def test_make_knows_the_verb(command: str) -> None:
    words = ["make", "-n", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "demo" in words:
        said = done.stdout.index("a few minutes on two CPU cores")
        assert said < done.stdout.index("build --model tiny"), "said before the work"


@pytest.mark.parametrize("command", PARSED)
def test_the_command_line_takes_it(command: str) -> None:
    """`make_context` parses and converts everything, and runs nothing."""
    group: Any = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = group.make_context("pixart-rt", words)
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, list(words), parent=context)
    assert context.params


@pytest.mark.slow
def test_the_first_image_is_made_as_the_readme_says(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "pixart-rt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pixart_rt "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done

    done = [run("bash", "-c", line) for line in commands(README) if line in RUN]
    assert len(done) == len(RUN)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    offered = next(line for line in done[0].stderr.splitlines() if line.startswith("next: "))
    assert offered.removeprefix("next: ") in RUN, "what build offers is README's next command"
    assert len(snippets(README)) == 1
    run(sys.executable, "-c", snippets(README)[0])
    assert (tmp_path / "circle.png").is_file()
