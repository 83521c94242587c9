"""The wheel: what it holds, and that it builds and draws away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_once_and_the_tiny_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pixart_rt"}
    tracked = [*ROOT.glob("pixart_rt/**/*.py")]
    for room in ("kernels", "export", "training"):
        tracked += [
            ROOT / "pixart_rt" / path.relative_to(ROOT) for path in ROOT.glob(f"{room}/**/*.py")
        ]
    missing = {path.relative_to(ROOT).as_posix() for path in tracked} - set(names)
    assert not missing
    recipes = {path.name for path in (ROOT / "recipes").glob("*.toml")}
    assert recipes and {f"pixart_rt/recipes/{name}" for name in recipes} <= set(names)
    for folder in ("tokenizer", "text_encoder", "transformer", "transformer_256", "vae"):
        assert any(name.startswith(f"pixart_rt/assets/tiny/{folder}/") for name in names), folder


@pytest.mark.slow
def test_an_installed_wheel_builds_and_generates_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed without dependencies into a folder of its own, which Python searches first."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", site, wheel],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pixart_rt", *arguments], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    where = subprocess.run(
        [sys.executable, "-c", "import pixart_rt; print(pixart_rt.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    bundle = run("build", "--model", "tiny", "--res", "256", "--backend", "onnxruntime")
    image = run("generate", "a red circle above a blue square", "--bundle", bundle, "-o", "x.png",
                "--steps", "4")  # fmt: skip
    assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
