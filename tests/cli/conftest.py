"""Running a command in this process, and folders that hold a manifest and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pixart_rt.bundle import MANIFEST, Manifest
from pixart_rt.cli import main
from pixart_rt.config import EngineConfig, ModelConfig


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """run("build", "--res", 256): exit code, stdout and stderr of a command."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def hollow_bundle(tmp_path: Path) -> Path:
    """A folder with a sound manifest and no engines: whoever loads it fails with exit code 1."""
    folder = tmp_path / "hollow"
    folder.mkdir()
    manifest = Manifest(
        pixart_rt_version="0", key="k" * 64, created="2026-01-01T00:00:00+00:00",
        model={"name": "made up", "sha256": "0"}, model_config=ModelConfig().to_dict(),
        engine_config={"resolution": EngineConfig().resolution, "max_batch": 1}, components={},
        files={}, vae={}, scheduler="dpm-solver++", buckets=[[512, 2048]], versions={}, build={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder
