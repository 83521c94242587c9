"""Help: every verb shows examples, and the examples use options that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pixart_rt

VERBS = (
    "build", "generate", "fidelity", "plan", "convert", "train", "reparameterize", "merge",
    "inspect", "verify", "bench", "tune", "doctor",
)  # fmt: skip
GROUPS = {
    "data": ("extract", "edges", "plan"),
    "finetune": ("lora", "dreambooth", "lcm", "controlnet"),
}
COMMANDS = [*VERBS, *(f"{group} {verb}" for group, verbs in GROUPS.items() for verb in verbs)]


def examples(text: str) -> list[list[str]]:
    """The commands below "Examples:", words split; a trailing backslash joins two lines.

    `torchrun ... -m pixart_rt` is one way to say pixart-rt.
    """
    block = text.partition("Examples:\n")[2].partition("\n\n")[0]
    block = re.sub(r"torchrun [^\n]*-m pixart_rt ", "pixart-rt ", block)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_shows_examples_that_fit_its_options(run: Callable[..., Any], verb: str) -> None:
    outcome = run(*verb.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    shown = examples(outcome.out)
    assert len(shown) >= 2
    options = set(re.findall(r"(?<=[ ,])--?[a-z][a-z-]*", outcome.out.partition("\nOptions:")[2]))
    for words in shown:
        assert words[: 1 + len(verb.split())] == ["pixart-rt", *verb.split()]
        assert {word for word in words if word.startswith("-")} <= options


def test_the_root_lists_the_verbs(run: Callable[..., Any]) -> None:
    outcome = run("--help")
    listed = re.findall(r"^  ([a-z]+) ", outcome.out.partition("Commands:")[2], re.MULTILINE)
    assert listed == [*VERBS, *GROUPS]
    assert run().out == outcome.out, "without a verb the help is shown"


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_verbs(run: Callable[..., Any], group: str) -> None:
    outcome = run(group, "--help")
    listed = re.findall(r"^  ([a-z]+) ", outcome.out.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(GROUPS[group])


def test_version(run: Callable[..., Any]) -> None:
    assert run("--version").out.strip() == pixart_rt.__version__


def test_an_unknown_verb_or_option_is_one_line_and_exit_code_2(run: Callable[..., Any]) -> None:
    for words in (["bild"], ["reproduce", "ablation"], ["build", "--rse", "256"],
                  ["build", "--res", "big"], ["generate"],
                  ["generate", "x", "--bundle", "b", "-o", "o.png", "--scheduler", "euler"],
                  ["build", "--precision", "int3"], ["generate", "x", "--seed", "-1"]):  # fmt: skip
        outcome = run(*words)
        assert (outcome.code, outcome.out) == (2, ""), words
        assert outcome.error.endswith("--help`")


def test_python_dash_m_is_the_same_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pixart_rt", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_without_a_verb_shows_its_help(run: Callable[..., Any], group: str) -> None:
    outcome = run(group)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip() == run(group, "--help").out.strip()


def test_a_hint_names_the_verb(run: Callable[..., Any]) -> None:
    assert run("build", "--rse", 2).error.endswith("see `pixart-rt build --help`")
    assert run("finetune", "lora").error.endswith("see `pixart-rt finetune lora --help`")
