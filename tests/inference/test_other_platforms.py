"""Images by ONNX Runtime where Triton and POSIX's modules are missing, as on Windows and macOS.

They are hidden in a process of its own: Triton from everyone, the modules of POSIX from our code
(psutil and huggingface_hub of this machine need theirs).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HIDE = """
import builtins, sys

real = builtins.__import__

def hiding(name, globals=None, *rest, **words):
    head = name.partition(".")[0]
    ours = str((globals or {}).get("__name__")).startswith("pixart_rt")
    if head == "triton" or (ours and head in ("fcntl", "resource", "pwd", "grp")):
        raise ModuleNotFoundError(f"No module named {head!r}", name=head)
    return real(name, globals, *rest, **words)

builtins.__import__ = hiding
"""
GENERATE = """
import json
from pixart_rt.cli import main

status = main(["generate", "a red circle above a blue square", "--bundle", {bundle!r},
               "--output", {out!r}, "--steps", "2", "--seed", "5", "--prompt-cache", {cache!r}])
print(json.dumps([status, "triton" in sys.modules]))
"""
LAUNCH = """
import torch
from pixart_rt.kernels import catalog, launch, ln_modulate  # catalog imports all operators

assert not launch.interpreting()
x, table = torch.randn(2, 3, 8), torch.randn(6, 8)
given = (x, table, torch.randn(2, 6, 8), 0)
assert torch.equal(ln_modulate.ln_modulate(*given), ln_modulate.ln_modulate_ref(*given))
try:
    ln_modulate.ln_modulate_triton(*given)
except RuntimeError as error:
    print(error)
"""


def run(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_image_without_triton_and_posix(bundle_256: Path, tmp_path: Path) -> None:
    """The same image, byte for byte in its pixels, as with them."""
    from PIL import Image

    images = []
    for hidden in (True, False):
        out = tmp_path / f"{hidden}.png"
        code = GENERATE.format(bundle=str(bundle_256), out=str(out), cache=str(tmp_path / "cache"))
        prefix = HIDE if hidden else "import sys\n"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", prefix + code],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        status, has_triton = json.loads(done.stdout.splitlines()[-1])
        assert status == 0 and not (hidden and has_triton)
        images.append(Image.open(out).tobytes())
    assert images[0] == images[1]


def test_a_kernel_without_triton_is_its_reference_and_its_launch_an_error() -> None:
    assert "Triton is not installed" in run(LAUNCH)
