"""Plugins without a GPU: the real compiled kernels, their launches, and what the engine keeps."""

import ctypes
import gc
import re
import subprocess
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from pixart_rt.backends.trt import backend as trt
from pixart_rt.backends.trt import cuda_driver
from pixart_rt.backends.trt import engine as trt_engine
from pixart_rt.backends.trt import plugins as trt_plugins
from pixart_rt.backends.trt.backend import TensorRTBackend, import_library
from pixart_rt.backends.trt.cuda_driver import Driver
from pixart_rt.backends.trt.plugin_kernels import (
    OPERATORS,
    KernelImage,
    KernelSpec,
    Parameter,
    arguments,
    pack,
    unpack,
)
from pixart_rt.bundle import Manifest, Measurement, PluginVariant
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export.plugins.graph import compile_kernels
from pixart_rt.kernels.attention import _attention_kernel, attention_qkv_packed_ref
from pixart_rt.kernels.ln_modulate import _ln_modulate_kernel, ln_modulate_ref

D, R, H, K = 144, 6, 2, 72
NORM = KernelSpec(op="ln_modulate", dtypes=("float16", "float16", "float32"), sizes=(D, R))
ATTENTION = KernelSpec(op="attention_qkv_packed", dtypes=("float16",), sizes=(H, K))
TARGETS = ("sm80", "sm86", "sm89", "sm120")
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture(scope="module")
def packed():
    """The kernels as an engine gets them, compiled by the real compiler in its process."""
    wide = replace(ATTENTION, sizes=(16, K))  # XL/2's heads
    norm = replace(NORM, sizes=(1152, R))
    specs = [each.to_text() for each in (NORM, ATTENTION, wide, norm)]
    return compile_kernels(specs, TARGETS, 8192)


def image_of(packed, spec, target="sm80"):
    return next(each for each in unpack(packed[spec.to_text()]) if each.target == target)


def planned(image, spec, shape, row=3):
    """A launch of `spec` with made-up addresses."""
    inputs = [1 << 20] * len(spec.dtypes)
    return OPERATORS[spec.op].launch(image, shape, row, inputs, 2 << 20, 3 << 20)


SHAPES = {NORM: (3, 37, D), ATTENTION: (3, 150, 3, H, K)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", [NORM, ATTENTION], ids=["norm", "attention"])
def test_arguments_are_laid_out_as_the_binary_declares(packed, tmp_path, spec, target):
    """The oracle is the binary's own table of parameters, hidden scratch pointers included."""
    image = image_of(packed, spec, target)
    (tmp_path / "k.cubin").write_bytes(image.binary)
    listing = subprocess.run(
        [NVIDIA / "cuobjdump", "-elf", tmp_path / "k.cubin"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)", listing)
    declared = sorted(tuple(int(each, 16) for each in row) for row in found)
    values = arguments(image, planned(image, spec, SHAPES[spec]).values)
    offset, expected = 0, []
    for index, value in enumerate(values):
        size = ctypes.sizeof(value)
        offset = -(-offset // size) * size
        expected.append((index, offset, size))
        offset += size
    assert declared == expected
    assert [each.value for each in values[-2:]] == [0, 0]
    assert f".nv.info.{image.name}" in listing


def test_the_shipped_configurations_do_not_spill(packed, tmp_path):
    for data in packed.values():
        for image in unpack(data):
            (tmp_path / "k.cubin").write_bytes(image.binary)
            usage = subprocess.run(
                [NVIDIA / "cuobjdump", "-res-usage", tmp_path / "k.cubin"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            assert "STACK:0 " in usage and "LOCAL:0 " in usage, (image.name, image.target)
            assert image.shared_bytes + 1024 <= 99 << 10  # of the smallest of the family


def test_nothing_of_the_building_machine_is_in_a_kernel(packed):
    for data in packed.values():
        assert b".py" not in data
        assert str(Path(__file__).parents[2]).encode() not in data


def interpret(image, kernel, launch, tensors, constants):
    """Run a launch in Triton's interpreter: addresses become the tensors that lie there."""
    known = {each.name: each.value for each in image.parameters if each.value is not None}
    values = {}
    for name, value in sorted({**known, **launch.values}.items()):
        group, _, index = name.partition(".")  # "layout.1" is an entry of a tuple
        if index:
            values[group] = (*values.get(group, ()), value)
        else:
            values[name] = tensors[value] if name.endswith(("_ptr", "_src")) else value
    kernel[launch.grid](**values, **constants)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the engine itself is run")
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 64)])
def test_a_planned_launch_of_ln_modulate_computes_it(packed, shape):
    """Grid and offsets are the plugin's, with no workspace; the arithmetic is Triton's."""
    B, N = shape
    image = image_of(packed, NORM)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, D, generator=random).half() * 3 + 1
    table = torch.randn(R, D, generator=random).half()
    shared = torch.randn(B, R, D, generator=random)
    y = torch.full_like(x, float("nan"))
    assert OPERATORS["ln_modulate"].workspace_bytes(x.shape) == 0
    inputs = [each.data_ptr() for each in (x, table, shared)]
    launch = OPERATORS["ln_modulate"].launch(image, x.shape, 3, inputs, y.data_ptr(), 0)
    tensors = {each.data_ptr(): each for each in (x, table, shared, y)}
    constants = {"row_scale_ptr": None, "stats_ptr": None, "D": D, "BLOCK_D": 256, "R": R,
                 "ROWS": image.rows, "ROUND": False}  # fmt: skip
    interpret(image, _ln_modulate_kernel, launch, tensors, constants)
    expected = ln_modulate_ref(x.double(), table.double(), shared.double(), 3)
    torch.testing.assert_close(y.double(), expected, atol=4e-3, rtol=2e-3)  # fp16 keeps 11 bits


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the engine itself is run")
@pytest.mark.parametrize("shape", [(1, 5), (2, 150)])
def test_a_planned_launch_of_attention_computes_it(packed, shape):
    B, N = shape
    image = image_of(packed, ATTENTION)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, K, generator=random).half()
    out = torch.full((B, N, H * K), float("nan"), dtype=torch.float16)
    size = OPERATORS["attention_qkv_packed"].workspace_bytes(qkv.shape)
    workspace = torch.full((size // 4,), float("nan"))
    launch = OPERATORS["attention_qkv_packed"].launch(
        image, qkv.shape, 0, [qkv.data_ptr()], out.data_ptr(), workspace.data_ptr()
    )
    tensors = {each.data_ptr(): each for each in (qkv, out, workspace)}
    constants = {"q_rest": None, "kv_rest": None, "mask_ptr": None, "K": K,
                 "BLOCK_M": image.rows, "BLOCK_N": 64}  # fmt: skip
    interpret(image, _attention_kernel, launch, tensors, constants)
    expected = attention_qkv_packed_ref(qkv.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    assert workspace.isfinite().all()


def test_a_launch_that_names_other_arguments_is_our_mistake(packed):
    image = image_of(packed, NORM)
    values = planned(image, NORM, SHAPES[NORM]).values
    with pytest.raises(AssertionError, match="num_tokens"):
        arguments(image, {k: v for k, v in values.items() if k != "num_tokens"})


def test_an_address_that_the_code_cannot_use_is_refused(packed):
    image = image_of(packed, ATTENTION)
    launch = OPERATORS[ATTENTION.op].launch(image, (1, 5, 3, H, K), 0, [1 << 20], 24, 3 << 20)
    with pytest.raises(BackendError, match=r"put out_ptr of _attention_kernel at 0x18, .*of 16"):
        arguments(image, launch.values)


def test_images_survive_the_way_through_an_engine(packed):
    for data in packed.values():
        images = unpack(data)
        assert [each.target for each in images] == list(TARGETS)
        assert all(each.binary.startswith(b"\x7fELF") for each in images)
        assert pack(images) == data
        assert unpack(data + b"\0") == images  # a container may pad


@pytest.mark.parametrize("keep", [2, 100, -1])
def test_damaged_images_are_refused(packed, keep):
    data = packed[NORM.to_text()]
    with pytest.raises(BundleError, match="build the bundle again"):
        unpack(data[:keep])


pytest.importorskip("tensorrt_rtx_bindings", reason="plugins are made by its interface")
TRT = import_library("tensorrt-rtx")


def test_a_plugin_s_fields_make_the_same_plugin(packed):
    """Node -> plugin -> fields, as the builder asks for them -> plugin of the running process."""
    text, kinds = NORM.to_text(), TRT.PluginFieldType
    kept = text.encode() + b"\0", array("i", [3])  # fields hold addresses only
    node = TRT.PluginFieldCollection(
        [
            TRT.PluginField("kernel", kept[0], kinds.CHAR),
            TRT.PluginField("row", kept[1], kinds.INT32),
        ]
    )
    builder = trt_plugins.creator(TRT, "ln_modulate", packed)
    built = builder.create_plugin("n", node, TRT.TensorRTPhase.BUILD)
    runner = trt_plugins.creator(TRT, "ln_modulate", {})  # it knows no kernels of its own
    clone = built.clone()
    stored = clone.get_fields_to_serialize()
    del built
    gc.collect()
    loaded = runner.create_plugin("n", stored, TRT.TensorRTPhase.RUNTIME)
    assert loaded.spec == NORM and loaded.row == 3
    assert loaded.packed == packed[text]
    assert loaded.images == unpack(packed[text])
    assert (loaded.plugin_name, loaded.plugin_namespace) == ("LnModulate", "pixart_rt")


@pytest.mark.parametrize("at", range(4))
def test_a_plugin_takes_dense_tensors_of_its_kernel_s_dtypes_only(packed, at):
    plugin = trt_plugins.plugin_class(TRT)(NORM, 0, packed[NORM.to_text()])
    expected = (*NORM.dtypes, "float16")[at]  # three inputs, one output
    for dtype, name in trt_plugins.DTYPES.items():
        for form in (TRT.TensorFormat.LINEAR, TRT.TensorFormat.CHW32):
            desc = SimpleNamespace(format=form, type=getattr(TRT.DataType, name))
            tensors = [SimpleNamespace(desc=desc)] * 4
            right = dtype == expected and form == TRT.TensorFormat.LINEAR
            assert plugin.supports_format_combination(at, tensors, 3) is right


class FakeCuda:
    """The driver's functions, noting what they are called with."""

    def __init__(self, capability=(8, 9), failing=None):
        self.capability, self.failing, self.calls = capability, failing, []

    def __getattr__(self, name):
        def call(*values):
            self.calls.append((name, values))
            if name == self.failing:
                return 2
            if name == "cuDeviceGetAttribute":
                target, attribute, _ = values
                target._obj.value = self.capability[attribute.value - cuda_driver.CAPABILITY_MAJOR]
            elif name == "cuCtxGetDevice":
                values[0]._obj.value = 1
            elif name in ("cuModuleLoadData", "cuModuleGetFunction"):
                values[0]._obj.value = 77
            elif name == "cuGetErrorString":
                values[1]._obj.value = b"out of memory"
            elif name == "cuLaunchKernel":
                self.launched = launched(values)
            return 0

        return call

    def names(self):
        return [name for name, _ in self.calls]


def launched(values):
    """Function, grid, block, shared bytes, stream, and the first eight bytes of every argument."""
    function, *numbers, stream, pointers, extra = values
    assert extra is None
    return function.value, [each.value for each in numbers], stream.value, list(pointers)


def read(address, kind):
    return ctypes.cast(address, ctypes.POINTER(kind)).contents.value


def test_a_plugin_launches_its_kernel_on_the_given_stream(packed, monkeypatch):
    """enqueue as TensorRT calls it, down to what the driver is given."""
    library = FakeCuda()
    driver = Driver(library)
    monkeypatch.setattr(trt_plugins, "driver", lambda: driver)
    plugin = trt_plugins.plugin_class(TRT)(ATTENTION, 0, packed[ATTENTION.to_text()])
    B, N = 2, 300
    desc = [SimpleNamespace(dims=TRT.Dims((B, N, 3, H, K)))]
    attached = plugin.attach_to_context(None)
    assert library.names().count("cuModuleLoadData") == 1
    for _ in range(2):
        attached.enqueue(desc, None, [1 << 40], [2 << 40], 3 << 40, 555)
    image = image_of(packed, ATTENTION, "sm89")
    assert library.names().count("cuModuleLoadData") == 1, "a kernel is loaded once"
    asked = dict(library.calls)["cuFuncSetAttribute"]
    assert (asked[1].value, asked[2].value) == (8, image.shared_bytes)
    assert image.shared_bytes > 48 << 10
    function, numbers, stream, pointers = library.launched
    tiles = -(-N // image.rows)
    assert (function, stream) == (77, 555)
    assert numbers == [tiles, H, B, 32 * image.num_warps, 1, 1, image.shared_bytes]
    values = {
        each.name: read(at, {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32,
                             "f32": ctypes.c_float}[each.kind])
        for at, each in zip(pointers, image.parameters, strict=False)
    }  # fmt: skip
    assert values["q_src"] == values["kv_src"] == 1 << 40
    assert (values["out_ptr"], values["lse_ptr"]) == (2 << 40, 3 << 40)
    assert values["num_queries"] == values["num_keys"] == N
    layout = [values[f"layout.{index}"] for index in range(5)]
    assert layout == [0, H, 2 * H, 3 * H * K, 3 * H * K]  # first heads, strides of tokens
    assert len(pointers) == len(image.parameters) + 2


@pytest.mark.parametrize("call", ["cuCtxGetDevice", "cuModuleLoadData", "cuLaunchKernel"])
def test_an_error_of_the_driver_has_its_words_and_reaches_the_engine_s_caller(
    packed, monkeypatch, call
):
    driver = Driver(FakeCuda(failing=call))
    monkeypatch.setattr(trt_plugins, "driver", lambda: driver)
    plugin = trt_plugins.plugin_class(TRT)(NORM, 0, packed[NORM.to_text()])
    desc = [SimpleNamespace(dims=TRT.Dims((1, 5, D)))]
    with pytest.raises(BackendError, match=rf"{call} says 'out of memory' \(error 2\)"):
        plugin.enqueue(desc, None, [16, 32, 48], [64], 80, 6)
    assert "out of memory" in trt_plugins.failure()
    assert trt_plugins.failure() == ""


def test_a_gpu_without_a_kernel_is_named(packed):
    with pytest.raises(BackendError, match=r"for sm80, sm86, sm89, sm120, this GPU is sm90"):
        Driver(FakeCuda((9, 0))).function(unpack(packed[NORM.to_text()]))


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-driver.so")
    with pytest.raises(BackendError, match="needs the NVIDIA driver"):
        Driver()


def test_an_engine_that_a_plugin_stopped_says_why():
    trt_plugins._failures.append("cuLaunchKernel says 'no'")
    engine = trt_engine.Engine.__new__(trt_engine.Engine)
    engine._device, engine._arena = None, SimpleNamespace(take=lambda stream: None)
    engine._path = Path("x.engine")
    context = SimpleNamespace(execute_async_v3=lambda stream: False)
    stream = SimpleNamespace(cuda_stream=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        with pytest.raises(BackendError, match="cuLaunchKernel says 'no'"):
            engine._execute(context, [])
        with pytest.raises(BackendError, match="refused to run"):  # the next one has no reason
            engine._execute(context, [])


GPU = "NVIDIA GeForce RTX 4090"


def measurement(plain, plugins, right=True):
    return Measurement(
        plain=plain, plugins=plugins, right=right, difference="rms error 1e-3", shapes={}, date=""
    )


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({}, "model"),
        ({GPU: measurement(10.0, 9.0)}, "model-plugins"),
        ({GPU: measurement(9.0, 9.0)}, "model"),
        ({GPU: measurement(9.0, 10.0)}, "model"),
        ({GPU: measurement(10.0, 9.0, right=False)}, "model"),
        ({"NVIDIA A100": measurement(10.0, 9.0)}, "model"),
    ],
    ids=["nothing", "faster", "equal", "slower", "wrong", "another GPU"],
)
def test_what_runs_is_what_the_manifest_found_faster(
    make_bundle, tmp_path, monkeypatch, measured, expected
):
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name in ("model", "model-plugins"):
        (folder / f"{name}.engine").write_bytes(b"x")
    variant = PluginVariant(
        parts=("transformer/model-plugins.engine",), parity={}, measured=measured
    )
    bundle, manifest = make_bundle(
        "transformer", ("transformer/model.engine",), targets=("sm89",), plugins=variant
    )
    (bundle / "manifest.json").write_text(manifest.to_json())
    manifest = Manifest.read(bundle)
    assert manifest.components["transformer"].plugins == variant
    order = []
    monkeypatch.setattr(trt, "register", lambda library: order.append("register"))
    monkeypatch.setattr(trt, "Engine", lambda library, path, *a, **k: order.append(path.stem))
    monkeypatch.setattr(trt, "Arena", lambda device: None)
    monkeypatch.setattr(trt, "capability", lambda device: "sm89")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    backend = TensorRTBackend("tensorrt-rtx")
    backend.load(bundle, manifest, "transformer", torch.device("cuda"))
    assert order == (["register"] if "plugins" in expected else []) + [expected]


def test_a_variant_without_engines_is_never_chosen():
    variant = PluginVariant(parts=(), parity={}, measured={GPU: measurement(10.0, 9.0)})
    assert not variant.faster_on(GPU)


def test_an_image_s_parameters_are_named_tuples_again():
    image = KernelImage(
        target="sm80", name="k", num_warps=4, shared_bytes=0, rows=1, binary=b"\0\1\2",
        parameters=(Parameter("x", "u64", None), Parameter("eps", "f32", 1e-6)),
    )  # fmt: skip
    assert unpack(pack([image, image])) == (image, image)
