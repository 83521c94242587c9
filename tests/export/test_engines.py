"""TensorRT-RTX builds without a GPU, of real exported graphs, and all the ways they fail."""

import os
import signal
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BackendError, BuildError, ConfigError
from pixart_rt.export import engines
from pixart_rt.export.engines import build_tensorrt, check_profiles, check_targets, engine_targets
from pixart_rt.export.onnx_export import export_onnx, transformer_graph
from pixart_rt.model.transformer import PixArtTransformer

CONFIG = ModelConfig(
    num_layers=1, num_heads=1, caption_channels=32, max_text_tokens=20, sample_size=32,
    micro_conditioning=False,
)  # fmt: skip
ROWS = {"num_null": [0, 1, 2], "num_text": [1, 1, 4], "num_outputs": [16, 16, 32]}
PROFILES = [{"batch": [1, 1, 2], "num_tokens": [231, 256, 256], **ROWS}]
RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def fp16(tmp_path_factory):
    """A real denoiser in half precision, as ONNX."""
    path = tmp_path_factory.mktemp("fp16") / "transformer.onnx"
    module = DenoiserModule(PixArtTransformer(CONFIG).half()).eval().requires_grad_(False)
    export_onnx(transformer_graph(module, CONFIG), path)
    return path


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_an_engine_for_a_gpu_that_is_not_here(fp16, tmp_path):
    path = tmp_path / "transformer.engine"
    stats = build_tensorrt(fp16, path, library=RTX, profiles=PROFILES, targets=("sm80",))
    assert stats.engine_bytes == path.stat().st_size > 100_000
    assert stats.library_version.startswith("tensorrt-rtx 1.")
    # the worker's own peak: it holds the library (some 100 MiB) but no torch
    assert 50 << 20 < stats.peak_bytes < 600 << 20
    assert stats.seconds > 0
    assert [file.name for file in tmp_path.iterdir()] == ["transformer.engine"]


def test_one_engine_for_two_gpus_and_two_profiles(fp16, tmp_path):
    profiles = [*PROFILES, {**ROWS, "batch": [1, 1, 1], "num_tokens": [100, 128, 128]}]
    one, two = tmp_path / "one.engine", tmp_path / "two.engine"
    build_tensorrt(fp16, one, library=RTX, profiles=PROFILES, targets=("sm89",))
    build_tensorrt(fp16, two, library=RTX, profiles=profiles, targets=("sm80", "SM89"))
    assert two.stat().st_size > one.stat().st_size  # it holds more kernels, the same weights


@pytest.mark.parametrize("target", ["sm70", "sm90", "ampere"])
def test_an_unsupported_target_is_refused_before_any_work(tmp_path, target):
    with pytest.raises(ConfigError, match=rf"target {target} is not supported.*sm80, sm86, sm89"):
        build_tensorrt(  # the graph does not even exist
            tmp_path / "none.onnx", tmp_path / "x.engine", library=RTX, profiles=PROFILES,
            targets=("sm80", target),
        )  # fmt: skip


def test_no_target_and_no_gpu(no_gpu):
    with pytest.raises(ConfigError, match=r"no usable NVIDIA GPU; choose --target among .*sm89"):
        check_targets(RTX, ())


def test_tensorrt_builds_for_the_present_gpu_only(monkeypatch, no_gpu):
    with pytest.raises(BackendError, match="pip install tensorrt") as caught:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        engine_targets("tensorrt")
    assert "not installed" in str(caught.value)
    library = type(sys)("tensorrt")  # has no ComputeCapability, as the real one
    library.__version__ = "11.0"
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    assert engine_targets("tensorrt") == ()
    with pytest.raises(ConfigError, match="build on one that has"):
        check_targets("tensorrt", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert check_targets("tensorrt", ()) == ("sm90",)
    assert check_targets("tensorrt", ("sm90",)) == ("sm90",)
    with pytest.raises(ConfigError, match=r"sm80 is not supported.*present GPU only sm90"):
        check_targets("tensorrt", ("sm80",))


def test_an_unknown_library():
    with pytest.raises(ConfigError, match=r"'onnx' is no engine library; .*tensorrt-rtx, tensorrt"):
        engine_targets("onnx")


@pytest.mark.parametrize("values", [[2, 1, 4], [-1, 1, 1], [0, 0, 0], [1, 2]])
def test_a_range_is_ordered_and_positive(values):
    with pytest.raises(ConfigError, match="batch has the range"):
        check_profiles([{"batch": values}])


def refused(graph, tmp_path, profiles=PROFILES, targets=("sm80",)):
    """The one-line message of a build that fails, having left nothing behind."""
    with pytest.raises(BuildError) as caught:
        build_tensorrt(
            graph, tmp_path / "x.engine", library=RTX, profiles=profiles, targets=targets
        )
    assert "\n" not in str(caught.value)
    assert not [file for file in tmp_path.iterdir() if ".engine" in file.name]
    return str(caught.value)


def test_a_truncated_graph(fp16, tmp_path):
    graph = tmp_path / "bad.onnx"
    graph.write_bytes(fp16.read_bytes()[:5000])
    assert "bad.onnx was not parsed: " in refused(graph, tmp_path)


def test_a_graph_whose_weights_are_missing(fp16, tmp_path):
    graph = tmp_path / "transformer.onnx"
    graph.write_bytes(fp16.read_bytes())
    assert "Failed to import initializer" in refused(graph, tmp_path)


def test_a_graph_that_does_not_exist(tmp_path):
    assert "none.onnx does not exist" in refused(tmp_path / "none.onnx", tmp_path)


def write_onnx(path, nodes, weights=()):
    """A graph from x [batch, 64] to y of the same shape."""
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], weights)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_the_first_bad_node_is_named(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="fine"),
        helper.make_node("NoSuchOperator", ["r"], ["y"], name="culprit", domain="nobody"),
    ]
    message = refused(write_onnx(tmp_path / "bad.onnx", nodes), tmp_path, [{"batch": [1, 2, 4]}])
    assert "node 1 'culprit' (NoSuchOperator)" in message


def test_a_dimension_without_a_range_is_named(fp16, tmp_path):
    message = refused(fp16, tmp_path, [{"batch": [1, 2, 4]}])
    assert "tokens axis 1 is called 'num_tokens'" in message


def test_float32_for_turing_says_what_to_do(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = write_onnx(tmp_path / "fp32.onnx", nodes, [weight])
    message = refused(graph, tmp_path, [{"batch": [1, 2, 4]}], targets=("sm75",))
    assert "FP32 GEMM is not supported" in message
    assert message.endswith("needs --precision fp16")


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "killed, most likely for its memory"), (signal.SIGABRT, "with SIGABRT")],
)
def test_a_library_that_dies_is_one_error_with_its_last_words(
    fp16, tmp_path, monkeypatch, number, words
):
    worker = tmp_path / "dying_worker.py"
    worker.write_text(
        "import os, sys\nprint('last words', file=sys.stderr, flush=True)\n"
        f"os.kill(os.getpid(), {int(number)})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(engines, "WORKER", "dying_worker")
    message = refused(fp16, tmp_path)
    assert words in message
    assert "last words" in message


def test_a_failed_build_keeps_the_engine_that_was_there(fp16, tmp_path):
    path = tmp_path / "transformer.engine"
    path.write_bytes(b"the old engine")
    with pytest.raises(BuildError):
        build_tensorrt(fp16, path, library=RTX, profiles=[{"batch": [1, 1, 1]}], targets=("sm80",))
    assert path.read_bytes() == b"the old engine"
    assert os.listdir(tmp_path) == ["transformer.engine"]
