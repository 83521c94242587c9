"""TensorRT engines: what can be known without a GPU, and (marked gpu) what they compute."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from pixart_rt.backends import get_backend
from pixart_rt.backends.component import Availability
from pixart_rt.backends.trt import engine as trt_engine
from pixart_rt.backends.trt.arena import Arena
from pixart_rt.backends.trt.backend import import_library, supported_targets
from pixart_rt.backends.trt.cache import RuntimeCache, cache_folder
from pixart_rt.backends.trt.engine import Engine, deserialize, fitting_profile
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export.onnx_export import export_onnx, transformer_graph, transformer_inputs

from .conftest import CONFIG

WIDE = {"tokens": ((1, 100, 16), (2, 256, 16), (8, 256, 16))}
NARROW = {"tokens": ((2, 231, 16), (2, 240, 16), (2, 256, 16))}


def test_the_profile_is_the_one_that_fits():
    assert fitting_profile([NARROW, WIDE], {"tokens": (1, 240, 16)}) == 1
    assert fitting_profile([NARROW, WIDE], {"tokens": (2, 120, 16)}) == 1


def test_of_several_profiles_the_one_tuned_nearest():
    assert fitting_profile([WIDE, NARROW], {"tokens": (2, 236, 16)}) == 1
    assert fitting_profile([WIDE, NARROW], {"tokens": (2, 256, 16)}) == 0


def test_no_profile_names_the_shape_and_what_is_accepted():
    with pytest.raises(BackendError) as caught:
        fitting_profile([NARROW, WIDE], {"tokens": (2, 4096, 16)})
    message = str(caught.value)
    assert "tokens [2, 4096, 16]" in message
    assert "[2, 231, 16] to [2, 256, 16] or tokens [1, 100, 16] to [8, 256, 16]" in message
    with pytest.raises(BackendError, match="no profile"):  # another rank is no fit either
        fitting_profile([NARROW], {"tokens": (2, 240)})


def test_targets_of_tensorrt_rtx_in_order():
    targets = supported_targets("tensorrt-rtx")
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(targets)
    assert targets.index("sm89") < targets.index("sm120")  # by number, not by letters
    assert "none" not in targets
    assert "current" not in targets


def test_without_a_gpu_engines_can_be_built_but_not_run(monkeypatch, make_bundle, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = get_backend("tensorrt-rtx")
    state = backend.available()
    assert isinstance(state, Availability)
    assert not state.ok
    assert "can be built but not run" in state.reason
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "transformer.engine").write_bytes(b"engine")
    bundle, manifest = make_bundle("transformer", ("transformer/transformer.engine",))
    with pytest.raises(BackendError, match="run on an NVIDIA GPU, cpu is not supported"):
        backend.load(bundle, manifest, "transformer", torch.device("cpu"))


def test_an_engine_that_does_not_load_is_one_line_with_the_library_s_reason(tmp_path, capfd):
    path = tmp_path / "x.engine"
    path.write_bytes(b"not an engine" * 1000)
    with pytest.raises(BundleError, match=r"cannot load .*x\.engine: .*build the bundle") as e:
        deserialize(import_library("tensorrt-rtx"), path)
    assert "\n" not in str(e.value)
    assert "no reason given" not in str(e.value)
    assert capfd.readouterr() == ("", "")


class FakeStream:
    """A CUDA stream that is not the default one."""

    cuda_stream = 5
    device = torch.device("cpu")

    def __init__(self, device=None):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


def fake_engine(trt, calls):
    """An engine of the library's own interface, which doubles latents [1-4, 8] into a half
    precision image: only names that its classes really have can be called.
    """
    addresses, shapes = {}, {}

    def execute(stream):
        calls.append(("execute", stream))
        count = shapes["latents"][0] * 8
        source = (ctypes.c_float * count).from_address(addresses["latents"])
        doubled = torch.frombuffer(source, dtype=torch.float32).mul(2).half()
        ctypes.memmove(addresses["image"], doubled.data_ptr(), 2 * count)
        return True

    context = create_autospec(trt.IExecutionContext, instance=True)
    context.set_input_shape.side_effect = shapes.__setitem__
    context.set_tensor_address.side_effect = addresses.__setitem__
    context.get_tensor_shape.side_effect = lambda name: trt.Dims(shapes["latents"])
    context.set_device_memory.side_effect = lambda address, size: calls.append(("memory", size))
    context.set_optimization_profile_async.side_effect = lambda index, stream: calls.append(
        ("profile", index)
    )
    context.execute_async_v3.side_effect = execute
    engine = create_autospec(trt.ICudaEngine, instance=True)
    engine.num_io_tensors, engine.num_optimization_profiles = 2, 2
    engine.device_memory_size_v2 = 1000
    engine.get_tensor_name.side_effect = ["latents", "image"].__getitem__
    modes = {"latents": trt.TensorIOMode.INPUT, "image": trt.TensorIOMode.OUTPUT}
    engine.get_tensor_mode.side_effect = modes.__getitem__
    dtypes = {"latents": trt.DataType.FLOAT, "image": trt.DataType.HALF}
    engine.get_tensor_dtype.side_effect = dtypes.__getitem__
    profiles = [[trt.Dims((n, 8)) for n in sizes] for sizes in ((1, 1, 1), (2, 2, 4))]
    engine.get_tensor_profile_shape.side_effect = lambda name, index: profiles[index]
    engine.create_execution_context.return_value = context
    engine.create_runtime_config.return_value = create_autospec(trt.IRuntimeConfig, instance=True)
    return engine


def test_an_engine_is_called_as_the_library_s_interface_demands(monkeypatch, tmp_path):
    """The oracle is the interface of the real module, around arithmetic on the CPU."""
    trt, calls = import_library("tensorrt-rtx"), []
    engine = fake_engine(trt, calls)
    monkeypatch.setattr(trt_engine, "deserialize", lambda trt, path: (None, engine))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    cache = create_autospec(RuntimeCache, instance=True)
    part = Engine(trt, tmp_path / "x.engine", Arena(torch.device("cpu")), cache)
    assert part.input_names == ("latents",)
    assert calls == [("profile", 0), ("profile", 1), ("memory", 1000), ("memory", 1000)]
    for batch in (1, 3, 2):
        latents = torch.randn(8, batch, dtype=torch.float64).t()  # neither contiguous nor float32
        image = part({"latents": latents})
        assert image.dtype == torch.float32
        # half precision keeps 11 bits
        torch.testing.assert_close(image, 2 * latents.float(), atol=1e-3, rtol=1e-3)
    assert calls[-1] == ("execute", FakeStream.cuda_stream)
    assert cache.save.call_count == 2  # once a profile, not once a call
    with pytest.raises(BackendError, match=r"latents \[5, 8\]"):
        part({"latents": torch.zeros(5, 8)})


class FakeCache:
    """The library's runtime cache, which needs a GPU, as bytes."""

    def __init__(self):
        self.data = b"new"

    def deserialize(self, blob):
        self.data = blob
        return True

    def serialize(self):
        return self.data + b"+kernels"


class FakeConfig:
    def create_runtime_cache(self):
        return FakeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache


def test_the_runtime_cache_comes_back_in_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_folder() / "key.cache"
    for expected in (b"new", b"new+kernels"):
        cache, config = RuntimeCache(path), FakeConfig()
        cache.attach(config)
        assert config.cache.data == expected
        cache.save()
    assert [file.name for file in path.parent.iterdir()] == ["key.cache"]


def test_a_runtime_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = RuntimeCache(tmp_path / "file" / "key.cache")
    cache.attach(FakeConfig())
    cache.save()
    assert "was not kept" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_engine_equals_pytorch(
    make_bundle, tmp_path, transformer, monkeypatch, library, side_stream
):
    """Two profiles, several sizes, back to back on the default and on another stream."""
    from pixart_rt.export.engines import build_tensorrt

    if not (state := get_backend(library).available()).ok:
        pytest.skip(state.reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "transformer"
    folder.mkdir()
    export_onnx(transformer_graph(transformer, CONFIG), tmp_path / "transformer.onnx")
    profiles = [
        {"batch": [1, 1, 1], "num_tokens": [231, 256, 256]},
        {"batch": [2, 2, 4], "num_tokens": [231, 256, 256]},
    ]
    engine = folder / "transformer.engine"
    build_tensorrt(tmp_path / "transformer.onnx", engine, library=library, profiles=profiles)
    bundle, manifest = make_bundle("transformer", ("transformer/transformer.engine",))
    device = torch.device("cuda")
    component = get_backend(library).load(bundle, manifest, "transformer", device)
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for batch, num_tokens in ((1, 256), (2, 240), (4, 231), (1, 231)):
            inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=num_tokens)
            on_gpu = {name: tensor.to(device) for name, tensor in inputs.items()}
            actual = component(**on_gpu).cpu()
            # TF32 products keep 10 bits
            torch.testing.assert_close(actual, transformer(**inputs), atol=1e-2, rtol=1e-2)
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=300)
    with pytest.raises(BackendError, match=r"tokens \[2, 300, 16\]"):
        component(**{name: tensor.to(device) for name, tensor in inputs.items()})
    if library == "tensorrt-rtx":
        assert list(cache_folder().glob("*.cache"))


@pytest.mark.gpu
def test_a_truncated_engine_is_a_bundle_error(make_bundle, tmp_path, transformer):
    from pixart_rt.export.engines import build_tensorrt

    if not (state := get_backend("tensorrt-rtx").available()).ok:
        pytest.skip(state.reason)
    folder = tmp_path / "transformer"
    folder.mkdir()
    export_onnx(transformer_graph(transformer, CONFIG), tmp_path / "transformer.onnx")
    engine = folder / "transformer.engine"
    build_tensorrt(
        tmp_path / "transformer.onnx",
        engine,
        library="tensorrt-rtx",
        profiles=[{"batch": [1, 1, 1], "num_tokens": [231, 256, 256]}],
    )
    engine.write_bytes(engine.read_bytes()[:10_000])
    bundle, manifest = make_bundle("transformer", ("transformer/transformer.engine",))
    with pytest.raises(BundleError, match="damaged"):
        get_backend("tensorrt-rtx").load(bundle, manifest, "transformer", torch.device("cuda"))


def test_the_library_s_own_cuda_graphs_are_switched_on_where_asked(monkeypatch, tmp_path):
    trt = import_library("tensorrt-rtx")
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for asked in (False, True):
        engine = fake_engine(trt, [])
        config = engine.create_runtime_config.return_value
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        monkeypatch.setattr(
            trt_engine, "deserialize", lambda trt, path, engine=engine: (None, engine)
        )
        Engine(trt, tmp_path / "x", Arena(torch.device("cpu")), None, cuda_graphs=asked)
        expected = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if asked else None
        assert config.cuda_graph_strategy == (expected or trt.CudaGraphStrategy.DISABLED)
    with pytest.raises(BackendError, match="has none of its own"):
        other = SimpleNamespace(__name__="tensorrt", __version__="11")
        Engine(other, tmp_path / "x", Arena(torch.device("cpu")), None, cuda_graphs=True)


def test_engines_share_the_arena(monkeypatch, tmp_path):
    trt, calls, more = import_library("tensorrt-rtx"), [], []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    small, large = fake_engine(trt, calls), fake_engine(trt, more)
    large.device_memory_size_v2 = 5000
    engines = iter([small, large])
    monkeypatch.setattr(trt_engine, "deserialize", lambda trt, path: (None, next(engines)))
    arena = Arena(torch.device("cpu"))
    kept = [Engine(trt, tmp_path / "x", arena, None) for _ in range(2)]
    assert arena.size == 5000
    assert calls[-2:] == more[-2:] == [("memory", 5000), ("memory", 5000)]
    assert len(kept) == 2
