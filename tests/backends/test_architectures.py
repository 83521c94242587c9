"""A GPU that PyTorch was not built for is refused before a kernel is launched, with the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pixart_rt import doctor
from pixart_rt.backends import get_backend
from pixart_rt.backends.architectures import check_architecture, covers, lacking
from pixart_rt.backends.engine_files import check_device
from pixart_rt.checkpoints.bundle_module import save_module
from pixart_rt.cli.doctor import _fixes, _machine
from pixart_rt.errors import BackendError

from .conftest import T5

# What torch.cuda.get_arch_list() says: 2.11's wheels (pytorch/pytorch#182250), and 2.11 for 12.6.
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
V100, T4, A100, RTX_4090, H100, B200, B300 = (
    (7, 0),
    (7, 5),
    (8, 0),
    (8, 9),
    (9, 0),
    (10, 0),
    (10, 3),
)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (CU130, V100, False),
        (CU126, V100, True),
        (CU126, (6, 1), True),  # sm_60's code
        (CU130, T4, True),
        (CU130, RTX_4090, True),  # sm_86's
        (["sm_86"], A100, False),  # newer than the card, in its own major version
        (CU126, B200, False),  # no PTX
        (CU130, B300, True),  # sm_100's
        (CU130, (13, 0), True),  # the PTX
        (CU130[:-1], (13, 0), False),
        (["compute_75"], H100, True),
        (["compute_90"], A100, False),
        (["sm_90a"], H100, True),
        (["sm_100a", "compute_100a"], B300, False),
        (["sm_100f"], B300, True),
        (["sm_100f"], (12, 0), False),
        ([], H100, False),
    ],
)
def test_code_runs_where_nvidia_says_it_does(
    architectures: list[str], capability: tuple[int, int], expected: bool
) -> None:
    assert covers(architectures, capability) is expected


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """gpu(name, capability, architectures): a machine with one such card. It runs nothing."""

    def put(name: str, capability: tuple[int, int], architectures: list[str]) -> None:
        major, minor = capability
        facts = SimpleNamespace(name=name, major=major, minor=minor, total_memory=32 << 30)
        for attribute, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_arch_list": lambda: architectures,
            "get_device_capability": lambda device=None: capability,
            "get_device_name": lambda device=None: name,
            "get_device_properties": lambda device: facts,
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, value)

    return put


def test_a_v100_is_told_of_the_wheels_that_have_its_kernels(gpu: Callable[..., None]) -> None:
    gpu("Tesla V100-SXM2-32GB", V100, CU130)
    with pytest.raises(BackendError) as error:
        check_device(CUDA)
    message = str(error.value)
    assert "cuda:0 was requested" in message and "\n" not in message
    assert "Tesla V100-SXM2-32GB is sm_70" in message and "sm_75, sm_80" in message
    assert "pip install torch --index-url https://download.pytorch.org/whl/cu126" in message
    gpu("Tesla V100-SXM2-32GB", V100, CU126)
    check_device(CUDA)


def test_other_cards_are_told_something_that_helps_them(gpu: Callable[..., None]) -> None:
    gpu("NVIDIA B200", B200, CU126)
    found = lacking(CUDA)
    assert found is not None and "newer PyTorch" in found[1] and "cu126" not in found[1]
    gpu("Tesla K80", (3, 7), CU126)
    found = lacking(CUDA)
    assert found is not None and "cu126" not in found[1]


@pytest.mark.parametrize("architectures", [[], ["gfx90a", "gfx942"]])
def test_a_build_that_does_not_say_is_not_judged(
    gpu: Callable[..., None], architectures: list[str]
) -> None:
    gpu("anything", (9, 4), architectures)
    check_architecture(CUDA)


def test_the_cpu_needs_no_kernels(gpu: Callable[..., None]) -> None:
    gpu("Tesla V100", V100, CU130)
    check_architecture(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["torch", "torch-compile", "aoti", "onnxruntime"])
def test_loaders_refuse_before_anything_is_on_the_card(
    gpu: Callable[..., None],
    backend: str,
    make_bundle: Callable[..., Any],
    text_encoders: tuple[nn.Module, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text_encoder").mkdir()
    save_module(tmp_path / "text_encoder", text_encoders[0], T5)
    bundle = make_bundle("text_encoder", ("text_encoder/model.safetensors",), backend=backend)
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("weights were moved"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: pytest.fail("a stream was made"))
    gpu("Tesla V100", V100, CU130)
    with pytest.raises(BackendError, match="whl/cu126"):
        get_backend(backend).load(*bundle, "text_encoder", CUDA)


def test_doctor_names_the_card_the_reason_and_the_fix(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("Tesla V100", V100, CU130)
    (found,) = doctor.gpus()
    assert not found["ok"] and "sm_70" in found["reason"] and "whl/cu126" in found["fix"]
    facts = {"machine": {}, "gpus": [found], "driver": None, "builds": [], "libraries": {}}
    cells = [str(cell) for column in _machine(facts).columns for cell in column.cells]
    (line,) = [cell for cell in cells if "V100" in cell]
    assert "not usable" in line
    assert any(found["fix"] in line for line in _fixes({**facts, "backends": []})), (
        "whole, below the table"
    )
    gpu("Tesla V100", V100, CU126)
    (found,) = doctor.gpus()
    assert found["ok"] and found["fix"] == "" and found["target"] == "sm70"
