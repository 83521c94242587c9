"""AOTInductor packages, compiled once here, against PyTorch float32."""

import tempfile

import pytest
import torch

from pixart_rt.backends import get_backend
from pixart_rt.backends.aoti import _check_device, load_package
from pixart_rt.errors import BackendError, BundleError, ConfigError
from pixart_rt.export.engines import build_aoti
from pixart_rt.export.onnx_export import export_program, transformer_graph, transformer_inputs

from .conftest import CONFIG

CPU = torch.device("cpu")

# torch's own, when TorchInductor is first imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


@pytest.fixture(scope="module")
def program(transformer):
    return export_program(transformer_graph(transformer, CONFIG))


@pytest.fixture(scope="module")
def package(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("aoti") / "transformer.pt2"
    return path, build_aoti(program, path)


def test_the_package_equals_pytorch_at_several_sizes(package, make_bundle, tmp_path, transformer):
    path, stats = package
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / path.name).write_bytes(path.read_bytes())
    bundle, manifest = make_bundle("transformer", (f"transformer/{path.name}",))
    component = get_backend("aoti").load(bundle, manifest, "transformer", CPU)
    for batch, num_tokens in ((1, 2), (2, 37), (3, 64), (1, 231)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=num_tokens)
        # float32 sums in another order
        torch.testing.assert_close(component(**inputs), transformer(**inputs), atol=1e-5, rtol=1e-5)
    assert stats.engine_bytes == path.stat().st_size
    assert stats.seconds > 0
    assert stats.library_version == f"torch {torch.__version__}"


def test_nothing_is_left_beside_the_package(package):
    path, _ = package
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_truncated_package_is_one_line(package, make_bundle, tmp_path, capfd):
    path, _ = package
    data = path.read_bytes()
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / path.name).write_bytes(data[: len(data) // 2])
    bundle, manifest = make_bundle("transformer", (f"transformer/{path.name}",))
    with pytest.raises(BundleError, match=r"transformer\.pt2 is damaged") as caught:
        get_backend("aoti").load(bundle, manifest, "transformer", CPU)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_where_programs_may_not_run_is_named(package, monkeypatch, tmp_path):
    """dlopen's words where TMPDIR is mounted noexec; the bundle is not damaged."""
    path, _ = package
    words = "/t/x.so: failed to map segment from shared object"

    def load(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"Error in dlopen: {words}")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BackendError, match="noexec") as caught:
        load_package(path, CPU)
    assert str(tmp_path) in str(caught.value) and "TMPDIR" in str(caught.value)


def test_a_package_for_another_device_or_cpu_is_refused(package, monkeypatch):
    path, _ = package
    with pytest.raises(BackendError, match="compiled for cuda, cpu was requested"):
        _check_device(path, {"AOTI_DEVICE_KEY": "cuda"}, CPU)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(BackendError, match="compiled for AVX512, this CPU has AVX2"):
        _check_device(path, {"AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX512 AVX512_VNNI"}, CPU)
    _check_device(path, {"AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX2"}, CPU)  # and no more


def test_the_suffix_is_checked_before_any_work(program, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        build_aoti(program, tmp_path / "transformer.engine")
