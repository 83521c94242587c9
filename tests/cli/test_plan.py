"""`pixart-rt plan`, and `--vram` where it is applied."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.bundle import Manifest
from pixart_rt.config import TextPlace, Weights
from pixart_rt.memory.tiers import GIB, RESERVE

Run = Callable[..., Any]


def test_the_published_model_is_planned_without_files_or_network(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    outcome = run("plan", "--vram", "8G")
    assert outcome.code == 0
    last = outcome.out.strip().splitlines()[-1]
    assert last.startswith("text-int8-offload: peak 7.0")
    assert "full needs 12." in last
    for word in (
        "text_encoder",
        "transformer",
        "vae_decoder",
        "text_side",
        "prompts and plans",
        "bf16",
    ):
        assert word in outcome.out


def test_json_has_every_tier_in_bytes(run: Run) -> None:
    outcome = run("plan", "--model", "tiny", "--res", "256", "--batch", "2", "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert (record["model"], record["batch"], record["chosen"]) == ("tiny", 2, None)
    assert [tier["name"] for tier in record["tiers"]][:2] == ["full", "text-offload"]
    for tier in record["tiers"]:
        assert tier["peak"] == max(tier["stages"].values()) == tier["stages"][tier["peak_stage"]]


def test_nothing_fits_is_one_line_and_exit_code_1(run: Run) -> None:
    for words in ((), ("--json",)):
        outcome = run("plan", "--vram", "2G", *words)
        assert outcome.code == 1
        assert "the smallest is int8-text-cpu-tiled" in outcome.error
        if words:
            assert json.loads(outcome.out)["chosen"] is None


@pytest.mark.parametrize(
    "words", [("--vram", "much"), ("--batch", 0), ("--res", 300), ("--model", "nobody/nothing")]
)
def test_what_cannot_be_asked_is_exit_code_2(run: Run, words: tuple[object, ...]) -> None:
    outcome = run("plan", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error


def test_vram_at_the_build_is_applied_recorded_and_obeyed(run: Run, tmp_path: Path) -> None:
    """The limit is 1 MiB below what tiny's full tier needs."""
    tiers = json.loads(
        run("plan", "--model", "tiny", "--res", 256, "--precision", "fp32", "--json").out
    )["tiers"]
    decode = {tier["name"]: tier["stages"]["decode"] for tier in tiers}
    assert decode["text-offload"] < decode["full"]
    out = tmp_path / "b"
    low = run("build", "--model", "tiny", "--res", 256, "--out", out, "--vram", 1000)
    assert low.code == 1
    assert "the smallest is" in low.error
    assert not out.exists()
    other = run("build", "--model", "tiny", "--res", 256, "--vram", "8G", "--backend", "aoti")
    assert other.code == 2
    assert "tiers are for --backend torch" in other.error
    # on a CPU the prediction has more in it than `plan`'s, so search for the limit
    limit = RESERVE + 8 * GIB
    record: dict[str, Any] = {}
    for _ in range(2):
        done = run(
            "build", "--model", "tiny", "--res", 256, "--out", out, "--vram", limit, "--json",
            "--force",
        )  # fmt: skip
        assert done.code == 0, done.err
        record = json.loads(done.out)["build"]["memory"]
        limit = RESERVE + record["peak"] - 1
    manifest = Manifest.read(out)
    assert record["tier"] == "text-offload" == manifest.build["memory"]["tier"]
    assert manifest.text_place is TextPlace.OFFLOAD
    assert manifest.weights_of("text_encoder") is Weights.FULL
    image = tmp_path / "i.png"
    words = ("generate", "a red circle", "--bundle", out, "-o", image, "--steps", 1, "--vram")
    refused = run(*words, "700M")
    assert refused.code == 1
    assert "nothing fits" in refused.error
    done = run(*words, "1G")
    assert done.code == 0, done.err
    assert "memory: text encoder offload, 1 at once" in done.err
    assert image.is_file()


def test_engines_are_planned_and_run_where_they_fit(
    run: Run, bundle_256: Path, tmp_path: Path
) -> None:
    """Their precision is their own. What they reserve is measured by the build."""
    planned = run("plan", "--model", bundle_256, "--vram", "2G", "--json")
    assert planned.code == 0, planned.err
    record = json.loads(planned.out)
    assert (record["chosen"], record["resolution"]) == ("full", 256), "its own resolution"
    parts = record["tiers"][0]["components"]
    assert parts["transformer"]["dtype"] == "fp32 in onnxruntime"
    assert parts["transformer"]["activations"] > 0
    other = run("plan", "--model", bundle_256, "--res", 256, "--precision", "bf16")
    assert other.code == 2
    assert "is built in fp32" in other.error
    many = run("plan", "--model", bundle_256, "--batch", 3)
    assert many.code == 2
    assert "runs at most 2 at once" in many.error
    words = ("generate", "x", "--bundle", bundle_256, "-o", tmp_path / "x.png", "--steps", 1)
    refused = run(*words, "--vram", "600M")
    assert refused.code == 1
    assert "nothing fits" in refused.error
    done = run(*words, "--vram", "2G")
    assert done.code == 0, done.err
    assert "memory: text encoder resident, 2 at once, predicted peak" in done.err


def test_a_plan_loads_no_torch(bundle_256: Path) -> None:
    """Of a name, of a checkpoint's folder (tiny) and of a bundle."""
    asked = [[], ["--model", "tiny", "--res", "256"], ["--model", str(bundle_256)]]
    script = "import sys\nfrom pixart_rt.cli import main\n" + "".join(
        f"assert main(['plan', *{words}]) == 0\n" for words in asked
    )
    script += (
        "sys.exit(' '.join({'torch', 'numpy', 'diffusers', 'triton'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
