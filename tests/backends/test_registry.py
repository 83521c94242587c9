"""Backends by name, the automatic choice and the doctor's facts."""

import subprocess
import sys

import pytest
import torch

from pixart_rt import backends
from pixart_rt.backends import BACKENDS, choose_backend, get_backend, onnx_runtime
from pixart_rt.backends.component import Availability
from pixart_rt.backends.onnx_runtime import OnnxRuntimeBackend
from pixart_rt.doctor import report
from pixart_rt.errors import BackendError, ConfigError


@pytest.mark.parametrize("name", BACKENDS)
def test_every_name_gives_its_backend(name):
    backend = get_backend(name)
    state = backend.available()
    assert backend.name == name
    assert state.reason
    assert state.ok or state.fix  # what does not work says how it would


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"'cuda' is not one of onnxruntime, .*tensorrt-rtx"):
        get_backend("cuda")


def test_missing_tensorrt_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what an absent module looks like
    state = get_backend("tensorrt").available()
    assert not state.ok
    assert "tensorrt is not installed" in state.reason
    assert state.fix == "pip install tensorrt"


def test_auto_on_a_cpu_is_onnxruntime_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, why = choose_backend()
    assert name == "onnxruntime"
    assert "no usable NVIDIA GPU" in why


def test_auto_says_what_it_passed_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        OnnxRuntimeBackend, "available", lambda self: Availability(False, "broken", "mend it")
    )
    name, why = choose_backend()
    assert name == "torch"
    assert "passed over onnxruntime: broken" in why


class Installed:
    """A backend that says it works."""

    def __init__(self, name):
        self.name = name

    def available(self):
        return Availability(self.name not in ("tensorrt-rtx", "tensorrt"), f"says {self.name}")


@pytest.mark.parametrize(("has_cuda", "best"), [(True, "onnxruntime"), (False, "torch-compile")])
def test_auto_on_a_gpu_never_takes_what_would_leave_it_idle(monkeypatch, has_cuda, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "get_backend", Installed)
    monkeypatch.setattr(onnx_runtime, "has_cuda", lambda: has_cuda)
    name, why = choose_backend()
    assert name == best
    assert "on this GPU" in why
    assert "passed over tensorrt-rtx: says tensorrt-rtx; tensorrt: says tensorrt" in why


@pytest.mark.parametrize("name", BACKENDS)
def test_a_cuda_device_without_a_gpu_is_one_line(name, monkeypatch, make_bundle, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "engine").write_bytes(b"engine")
    bundle, manifest = make_bundle("transformer", ("transformer/engine",))
    with pytest.raises(BackendError, match=r"NVIDIA GPU|is not installed") as caught:
        get_backend(name).load(bundle, manifest, "transformer", torch.device("cuda"))
    assert "\n" not in str(caught.value)


def test_auto_with_a_target_is_the_library_that_builds_without_a_gpu():
    name, why = choose_backend(("sm80", "sm89"))
    assert name == "tensorrt-rtx"
    assert "sm80, sm89" in why
    with pytest.raises(ConfigError, match=r"no backend builds for sm70 .*sm80"):
        choose_backend(("sm70",))


def test_importing_the_registry_and_the_doctor_imports_no_torch():
    code = "import sys, pixart_rt.backends, pixart_rt.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_doctor_reports_every_backend_and_library():
    facts = report()
    assert [backend["name"] for backend in facts["backends"]] == list(BACKENDS)
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["auto"]["name"] == choose_backend()[0]
    assert set(facts) == {"machine", "gpus", "driver", "libraries", "backends", "auto", "builds"}
