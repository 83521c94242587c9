"""`inspect` and `verify` on a real bundle, on damaged copies and on folders that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.bundle import MANIFEST, Manifest, Measurement, PluginVariant


@pytest.fixture
def copy(bundle_256: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_256, tmp_path / "copy"))


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_folders_that_are_no_bundle(run: Callable[..., Any], copy: Path, verb: str) -> None:
    values = json.loads((copy / MANIFEST).read_text())
    for text, message in (
        (json.dumps(values | {"format_version": 99}), "bundle format 99"),
        (json.dumps({name: values[name] for name in values if name != "key"}), "damaged"),
        ("{ not json", "damaged"),
    ):
        (copy / MANIFEST).write_text(text)
        outcome = run(verb, copy)
        assert (outcome.code, outcome.out) == (1, "")
        assert message in outcome.error
    (copy / MANIFEST).unlink()
    assert "is not a bundle" in run(verb, copy).error


def test_inspect_json_is_the_manifest(run: Callable[..., Any], bundle_256: Path) -> None:
    outcome = run("inspect", bundle_256, "--json")
    assert json.loads(outcome.out) == json.loads((bundle_256 / MANIFEST).read_text())


def test_inspect_shows_the_main_facts(
    run: Callable[..., Any], bundle_256: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    outcome = run("inspect", bundle_256)
    manifest = Manifest.read(bundle_256)
    parts = manifest.components["transformer"].parts
    for fact in (manifest.key, "onnxruntime", "vae_decoder", "128x512", *parts):
        assert fact in outcome.out
    assert all(version in outcome.out for version in manifest.versions.values())


def test_inspect_shows_what_was_measured_of_plugins(run: Callable[..., Any], copy: Path) -> None:
    manifest = Manifest.read(copy)
    found = Measurement(plain=9, plugins=8.5, right=True, difference="", shapes={}, date="")
    variant = PluginVariant(parts=("p.engine",), parity={"rms": 0.25}, measured={"RTX": found})
    entry = manifest.components["transformer"]
    entry = replace(entry, plugins=variant, files={**entry.files, "p.engine": "0" * 64})
    (copy / "manifest.json").write_text(manifest.with_entry("transformer", entry).to_json())
    shown = " ".join(word for word in run("inspect", copy).out.split() if word != "│")
    for text in ("p.engine", "plugins parity: rms 0.25", "measured on RTX 9 ms", "(faster)"):
        assert text in shown


def test_inspect_cuts_no_value_on_a_narrow_terminal(
    run: Callable[..., Any], bundle_256: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in run("inspect", bundle_256).out


def test_verify_passes_a_sound_bundle(run: Callable[..., Any], bundle_256: Path) -> None:
    outcome = run("verify", bundle_256, "--json")
    result = json.loads(outcome.out)
    assert outcome.code == 0
    assert result["ok"] is True
    names = {check["name"] for check in result["checks"]}
    assert names == {"files", *Manifest.read(bundle_256).components}


def test_verify_fails_a_changed_file_and_names_it(run: Callable[..., Any], copy: Path) -> None:
    path = copy / "modulator.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    outcome = run("verify", copy)
    assert outcome.code == 1
    assert "modulator.safetensors is changed" in " ".join(outcome.out.split())
    assert "FAILED" in outcome.out


def test_verify_fails_a_missing_engine(run: Callable[..., Any], copy: Path) -> None:
    for part in Manifest.read(copy).components["transformer"].parts:
        (copy / part).unlink()
    outcome = run("verify", copy, "--json")
    checks = {check["name"]: check["ok"] for check in json.loads(outcome.out)["checks"]}
    assert outcome.code == 1
    assert checks["files"] is False and checks["transformer"] is False
    assert checks["vae_decoder"] is True
