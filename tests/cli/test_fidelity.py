"""`fidelity`: its table, its JSON, and what it refuses before loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.bundle import Manifest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no setting"),
        (["--step-cache", -1], "a number >= 0"),
        (["--guidance-stop", 2], "guidance_interval"),
        (["--step-cache", 0.1, "--steps", 0], "between 1 and"),
        (["--fewer-steps", 0], "between 1 and"),
        (["--student", "engines/lcm"], "DIR:SAMPLER:STEPS"),
        (["--student", "engines/dmd:dmd:4"], "must be 1 with dmd"),
        (["--step-cache", 0.1, "--prompts", "absent.txt"], "cannot be read"),
    ],
)
def test_impossible_settings_are_refused_before_loading(
    run: Callable[..., Any], hollow_bundle: Path, options: list[object], message: str
) -> None:
    outcome = run("fidelity", hollow_bundle, *options)
    assert outcome.code == 2
    assert message in outcome.error


def test_settings_are_compared(run: Callable[..., Any], bundle_256: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\ntwo green triangles\n")
    out = tmp_path / "out.json"
    outcome = run(
        "fidelity", bundle_256, "--prompts", prompts, "--steps", 4, "--step-cache", 0,
        "--step-cache", 1, "--guidance-stop", 0.5, "--fewer-steps", 3,
        "--student", f"{bundle_256}:dmd:1", "--seed", 7, "--json", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    document = json.loads(out.read_text())
    assert document["bundle"] == Manifest.read(bundle_256).key
    assert document["exact"]["steps"] == 4 and document["backend"] == "onnxruntime"
    results = {each["setting"]: each for each in document["results"]}
    names = ["step-cache 0", "step-cache 1", "guidance-stop 0.5", "3 steps",
             f"{bundle_256.name} dmd 1"]  # fmt: skip
    assert list(results) == names
    assert all(name in outcome.out for name in names)
    nothing, reused = results["step-cache 0"], results["step-cache 1"]
    assert nothing["psnr_db"] is None and nothing["ssim"] == 1
    assert nothing["mean_skipped_steps"] == 0 and reused["mean_skipped_steps"] > 0
    images = reused["images"]
    skipped = [len(image["skipped_steps"]) for image in images]
    assert reused["mean_skipped_steps"] == sum(skipped) / len(skipped)
    assert [image["prompt"] for image in images] == ["a red circle", "two green triangles"]
    assert [image["seed"] for image in images] == [7, 8]
    assert set(images[0]["skipped_steps"]) <= {1, 2}, "neither the first nor the last"
    assert results["guidance-stop 0.5"]["unguided_steps"] == 2
    for name in names[1:]:
        assert results[name]["psnr_db"] is not None and results[name]["ssim"] < 1


def test_a_file_of_the_users_is_not_replaced_unasked(
    run: Callable[..., Any], hollow_bundle: Path, tmp_path: Path
) -> None:
    """Before the bundle is loaded, which has nothing to load."""
    (tmp_path / "out.json").write_text("mine")
    for verb, options in (("fidelity", ["--step-cache", 0.1]), ("bench", [])):
        words = (verb, hollow_bundle, *options, "--json", tmp_path / "out.json")
        refused = run(*words)
        assert refused.code == 2 and "exists" in refused.error and "--force" in refused.error
        forced = run(*words, "--force")
        assert forced.code != 0 and "exists" not in forced.error, "now it continues, to the bundle"
        assert (tmp_path / "out.json").read_text() == "mine"
