"""What the kernel tests launch in the interpreter also compiles and launches for sm_90.

A launch that a test makes is one that a user can make: odd sizes, missing masks, unaligned tensors,
forced tiles. A sample in every run, taken evenly from the sorted list; all of them (minutes) by
`make test-all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.launches import Launches, Spec, decode, encode
from tests.kernels.test_jit_sm90 import ROOT, SHARED_LIMIT, on_standin, without_gpu

SAMPLE = 10  # about a second each
LEAST = 200  # distinct launches of all tests: 393 were counted
KERNEL_TESTS = {
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if path.name not in ("test_codegen.py", "test_jit_sm90.py", Path(__file__).name)
}


def check(specs: list[Spec], path: Path) -> None:
    path.write_text(json.dumps(specs))
    report = on_standin(str(path))
    assert not report["errors"]
    assert set(report["ran"].values()) == {1}
    assert 0 < report["most_shared"] <= SHARED_LIMIT
    assert not report["scratch"]


@without_gpu
def test_a_sample_compiles(launches: Launches, request: Any, tmp_path: Path) -> None:
    others = {item.path.name for item in request.session.items} - {Path(__file__).name}
    if not others >= KERNEL_TESTS:
        pytest.skip("the launches are those of the other kernel tests: run all of tests/kernels")
    specs = launches.sorted()
    assert len(specs) >= LEAST
    check(specs[:: len(specs) // SAMPLE][:SAMPLE], tmp_path / "launches.json")


@without_gpu
@pytest.mark.exhaustive
def test_all_compile(tmp_path: Path) -> None:
    written = tmp_path / "all.json"
    environment = {**os.environ, "PIXART_RT_LAUNCHES": str(written)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not exhaustive",
         *(f"tests/kernels/{name}" for name in sorted(KERNEL_TESTS))],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    specs = json.loads(written.read_text())
    assert len(specs) >= LEAST
    assert len(Counter(spec["kernel"][1] for spec in specs)) >= 14  # kernels
    linears = [spec for spec in specs if spec["kernel"][1] == "_linear_kernel"]
    read = {spec["args"][0].get("descriptor", spec["args"][0].get("tensor")) for spec in linears}
    assert "float8_e4m3fn" in read  # which the interpreter multiplies in float32
    check(specs, tmp_path / "launches.json")


def test_a_launch_survives_being_written_down() -> None:
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.empty(65, dtype=torch.bfloat16)
    values = [None, True, 3, 2.5, "bf16", torch.float16, (1, (x, None))]
    assert [decode(encode(value)) for value in values[:-1]] == values[:-1]
    number, (tensor, nothing) = decode(json.loads(json.dumps(encode(values[-1]))))
    assert (number, nothing, tensor.dtype) == (1, None, torch.bfloat16)
    assert tensor.data_ptr() % 16 == 0 and decode(encode(x[1:])).data_ptr() % 16 == 2
    described = TensorDescriptor(x, [4, 16], [16, 1], [2, 16])
    again = decode(encode(described))
    assert (again.shape, again.strides, again.block_shape) == ([4, 16], [16, 1], [2, 16])
    assert again.base.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="encode it here"):
        encode(object())


def test_launches_that_specialize_alike_are_one() -> None:
    import torch

    from pixart_rt.kernels.ln_modulate import _ln_modulate_kernel as kernel

    found, x = Launches(), torch.empty(64)
    for number, block in ((32, 8), (48, 8), (33, 8), (1, 8), (32, 16)):
        found.add(kernel, (1,), (x, number), {"BLOCK": block})
    found.add(kernel, (1,), (x[1:], 32), {"BLOCK": 8})
    assert len(found.specs) == 5  # 32 and 48 are one
