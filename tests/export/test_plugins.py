"""The graph with plugin nodes, engines built from it for GPUs that are not here, and the build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from pixart_rt.backends import get_backend
from pixart_rt.backends.trt.backend import TensorRTBackend
from pixart_rt.backends.trt.plugin_kernels import KernelSpec, unpack
from pixart_rt.bundle import Manifest, PluginVariant, damaged_files
from pixart_rt.checkpoints.bundle_module import DenoiserModule
from pixart_rt.config import EngineConfig, ModelConfig, Precision
from pixart_rt.errors import BuildError, ConfigError
from pixart_rt.export.build import build
from pixart_rt.export.checkpoint_source import random_transformer
from pixart_rt.export.engines import build_tensorrt
from pixart_rt.export.onnx_export import Graph, export_onnx, transformer_graph, transformer_inputs
from pixart_rt.export.plugins import compiler as plugin_compiler
from pixart_rt.export.plugins import graph as plugins_module
from pixart_rt.export.plugins.graph import (
    compile_kernels,
    export_with_plugins,
    kernels_of,
    with_functions,
)
from pixart_rt.export.worker.protocol import Refused

CONFIG = ModelConfig(
    num_layers=2, num_heads=2, caption_channels=32, max_text_tokens=20, sample_size=32,
    micro_conditioning=False,
)  # fmt: skip
PROFILES = [{
    "batch": [1, 1, 2], "num_tokens": [231, 256, 256], "num_null": [0, 1, 2],
    "num_text": [1, 1, 4], "num_outputs": [16, 16, 32],
}]  # fmt: skip
RTX, TARGETS = "tensorrt-rtx", ("sm80", "sm86", "sm89", "sm120")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}  # of outputs with a spread near 1


def make_graph(dtype: torch.dtype, config: ModelConfig = CONFIG) -> Graph:
    return transformer_graph(DenoiserModule(random_transformer(config, dtype)), config)


def export(folder: Path, dtype: torch.dtype, config: ModelConfig = CONFIG) -> Path:
    path = folder / "nodes.onnx"
    export_with_plugins(make_graph(dtype, config), path)
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("half"), torch.float16)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("single"), torch.float32)


@pytest.fixture(scope="module")
def kernels(half) -> dict[str, bytes]:
    return compile_kernels(kernels_of(half), TARGETS, 512)


def plugin_nodes(path: Path) -> list[tuple[str, int]]:
    """(operator, row) of every node that is not a standard one, in order."""
    found = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.domain not in ("", "ai.onnx"):
            assert node.domain == "pixart_rt"
            found.append((node.op_type, plugins_module._attributes(node)["row"]))
    return found


BLOCK = [("LnModulate", 0), ("AttentionQkvPacked", 0), ("LnModulate", 3)]


def test_two_operators_stay_nodes_and_all_else_is_standard(half) -> None:
    assert plugin_nodes(half) == [*BLOCK, *BLOCK, ("LnModulate", 0)]
    specs = {KernelSpec.from_text(text) for text in kernels_of(half)}
    dtypes = ("float16", "float16", "float32")
    assert specs == {
        KernelSpec(op="ln_modulate", dtypes=dtypes, sizes=(144, 6)),
        KernelSpec(op="ln_modulate", dtypes=dtypes, sizes=(144, 2)),
        KernelSpec(op="attention_qkv_packed", dtypes=("float16",), sizes=(2, 72)),
    }


def test_batch_and_tokens_stay_dynamic_through_the_nodes(half) -> None:
    graph = onnx.load(half, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    outputs = [node.output[0] for node in graph.node if node.domain == "pixart_rt"]
    assert len(outputs) == 7
    assert all(shapes[name][1:] == ["num_tokens", 144] for name in outputs)
    rows = [shapes[name][0] for name in outputs]  # images until the text is seen, then rows
    assert rows == ["batch"] * 2 + ["num_null + num_text"] * 5


def test_attention_is_no_node_where_its_kernel_does_not_run(single, tmp_path) -> None:
    only_norms = [("LnModulate", 0), ("LnModulate", 3)] * 2 + [("LnModulate", 0)]
    assert plugin_nodes(single) == only_norms  # float32
    narrow = replace(CONFIG, head_dim=48, num_heads=3)
    assert plugin_nodes(export(tmp_path, torch.float16, narrow)) == only_norms


def run(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_with_the_nodes_defined_it_computes_what_the_plain_graph_does(
    half, single, tmp_path, dtype
) -> None:
    """Oracles: the plain graph in ONNX Runtime, and the float32 module."""
    path = half if dtype == torch.float16 else single
    defined = path.with_name("defined.onnx")
    with_functions(path, defined)
    functions = onnx.load(defined, load_external_data=False).functions
    assert len(functions) == (4 if dtype == torch.float16 else 3)  # rows 0 and 3, last layer
    export_onnx(make_graph(dtype), tmp_path / "plain.onnx")
    oracle = DenoiserModule(random_transformer(CONFIG, torch.float32))
    random = torch.Generator().manual_seed(0)
    for batch, tokens in ((1, 231), (3, 37), (2, 2)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=tokens, generator=random)
        actual = run(defined, inputs)
        tolerance = TOLERANCE[dtype]
        plain = run(tmp_path / "plain.onnx", inputs)
        torch.testing.assert_close(actual, plain, atol=tolerance, rtol=tolerance)
        with torch.no_grad():
            expected = oracle(**inputs)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_a_node_with_another_row_computes_something_else(half, tmp_path) -> None:
    """What the test above would miss if the functions ignored their nodes."""
    model = onnx.load(half, load_external_data=False)
    node = next(each for each in model.graph.node if each.domain == "pixart_rt")
    next(each for each in node.attribute if each.name == "row").i = 3
    wrong = half.with_name("wrong.onnx")
    onnx.save(model, wrong)
    with_functions(wrong, half.with_name("wrong-defined.onnx"))
    with_functions(half, half.with_name("right-defined.onnx"))
    inputs = transformer_inputs(CONFIG, batch=1, num_tokens=37)
    right, other = (run(half.with_name(f"{name}-defined.onnx"), inputs)
                    for name in ("right", "wrong"))  # fmt: skip
    assert (right - other).abs().max() > 5 * TOLERANCE[torch.float16]


def test_an_engine_with_plugins_is_built_and_holds_the_kernels(half, kernels, tmp_path) -> None:
    path = tmp_path / "x.engine"
    stats = build_tensorrt(
        half, path, library=RTX, profiles=PROFILES, targets=TARGETS, kernels=kernels
    )
    assert stats.peak_bytes < 600 << 20  # the worker loads no torch
    engine = path.read_bytes()
    assert stats.engine_bytes == len(engine)
    nodes = {"[144, 6]": 4, "[144, 2]": 1, "[2, 72]": 2}  # by the sizes of their specs
    for text, packed in kernels.items():
        expected = next(count for sizes, count in nodes.items() if sizes in text)
        copies, rest = divmod(engine.count(packed), expected)
        assert copies >= 1 and not rest, "every node equally often"
        assert engine.count(text.encode()) >= expected
    assert [file.name for file in tmp_path.iterdir()] == ["x.engine"]


def test_a_node_whose_kernel_is_not_given_is_one_error(half, kernels, tmp_path) -> None:
    some = dict(list(kernels.items())[:1])
    with pytest.raises(BuildError, match=r"LnModulate|AttentionQkvPacked") as caught:
        build_tensorrt(
            half, tmp_path / "x.engine", library=RTX, profiles=PROFILES, targets=("sm80",),
            kernels=some,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_does_not_compile_is_a_build_error() -> None:
    spec = KernelSpec(op="attention_qkv_packed", dtypes=("float16",), sizes=(2, 72))
    with pytest.raises(BuildError, match="a plugin's kernel was not built"):
        compile_kernels([spec.to_text()], ("sm10",), 512)


PTX = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .f32 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4
)
.reqntid 128
{ .param .b32 inside; }"""


class Metadata:
    """What Triton says of a kernel that can be a plugin."""

    global_scratch_size = profile_scratch_size = 0
    num_ctas = 1
    tensordesc_meta: tuple[object, ...] = ()


def image(**changes):
    values = {
        "target": "sm80", "name": "k", "num_warps": 4, "shared_bytes": 0, "rows": 1, "binary": b"",
        "parameters": tuple(
            plugin_compiler.Parameter(name, kind, None)
            for name, kind in (("x", "u64"), ("n", "u32"), ("eps", "f32"))
        ),
    }  # fmt: skip
    return plugin_compiler.KernelImage(**{**values, **changes})


def test_code_with_the_expected_parameters_is_accepted() -> None:
    assert plugin_compiler.ptx_parameters(PTX) == ["u64", "u32", "f32", "u64", "u64"]
    plugin_compiler._check(image(), Metadata, PTX)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ptx": PTX.replace("	.param .u32 k_param_1,\n", "")}, "parameters are"),
        ({"ptx": PTX.replace(".u32 k_param_1", ".u64 k_param_1")}, "parameters are"),
        ({"ptx": PTX.replace(".reqntid 128", ".reqntid 256")}, "number of threads"),
        ({"global_scratch_size": 64}, "scratch memory"),
        ({"profile_scratch_size": 64}, "scratch memory"),
        ({"num_ctas": 2}, "clusters"),
        ({"tensordesc_meta": ({},)}, "tensor descriptors"),
    ],
    ids=lambda each: each if isinstance(each, str) else next(iter(each)),
)
def test_code_that_a_plugin_cannot_launch_is_refused(change, words) -> None:
    metadata = type("Changed", (Metadata,), change)
    with pytest.raises(Refused, match=rf"k for sm80 cannot be a plugin: .*{words}"):
        plugin_compiler._check(image(), metadata, change.get("ptx", PTX))


def test_the_compiler_refuses_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(plugin_compiler, "interpreting", lambda: True)
    with pytest.raises(Refused, match="TRITON_INTERPRET is set"):
        plugin_compiler.compile_all({"kernels": [], "targets": [], "tokens": 1})


WITH_PLUGINS = EngineConfig(
    resolution=256, backend=RTX, precision=Precision.FP16, targets=("sm80",),
    components=("transformer",), plugins=True,
)  # fmt: skip


def test_a_build_without_a_gpu_keeps_both_engines_and_runs_the_plain(
    pipeline_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = build(str(pipeline_folder(32)), tmp_path / "b", WITH_PLUGINS)
    manifest = Manifest.read(result.path)
    entry = manifest.components["transformer"]
    assert entry.parts == ("transformer/model.engine",)
    assert entry.plugins is not None
    assert entry.plugins.parts == ("transformer/model-plugins.engine",)
    assert entry.plugins.measured == {}
    assert "engine not run" in entry.plugins.parity["how"]
    assert entry.plugins.parity["rms"] < 1e-2
    assert not damaged_files(result.path, manifest)
    assert {path.name for path in (result.path / "transformer").iterdir()} == {
        "model.engine", "model-plugins.engine"
    }  # fmt: skip
    assert not (result.path / ".work").exists()
    assert build(str(pipeline_folder(32)), tmp_path / "b", WITH_PLUGINS).cached
    plain = build(
        str(pipeline_folder(32)), tmp_path / "b", replace(WITH_PLUGINS, plugins=False), force=True
    )
    assert not plain.cached and plain.manifest.components["transformer"].plugins is None


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "aoti", "onnxruntime-tensorrt"])
def test_plugins_are_for_tensorrt_only(backend) -> None:
    with pytest.raises(ConfigError, match=rf"backend {backend}, which has none; use tensorrt-rtx"):
        EngineConfig(backend=backend, plugins=True)


def test_plugins_need_the_transformer() -> None:
    with pytest.raises(ConfigError, match="without the transformer"):
        replace(WITH_PLUGINS, components=("vae_decoder",))


def test_plugins_for_a_gpu_that_is_too_old(tmp_path) -> None:
    config = replace(WITH_PLUGINS, targets=("sm75", "sm80"))
    with pytest.raises(ConfigError, match="requested for sm75, but its kernels need sm80"):
        build("tiny", tmp_path / "b", config)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_an_engine_with_plugins_equals_pytorch(tmp_path, monkeypatch, library, dtype) -> None:
    """Several sizes, back to back, on a stream of the caller's."""
    from pixart_rt.backends.engine_files import capability
    from pixart_rt.backends.trt import backend as trt
    from pixart_rt.bundle import ComponentEntry

    if not (state := get_backend(library).available()).ok:
        pytest.skip(state.reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = torch.device("cuda")
    target = capability(device)
    nodes = export(tmp_path, dtype)
    held = compile_kernels(kernels_of(nodes), (target,), 512)
    assert {each.target for packed in held.values() for each in unpack(packed)} == {target}
    build_tensorrt(nodes, tmp_path / "x.engine", library=library, profiles=PROFILES, kernels=held)
    variant = PluginVariant(parts=("x.engine",), parity={})
    entry = ComponentEntry(
        backend=library, precision="fp16", parts=(), files={}, targets=(target,), plugins=variant
    )
    monkeypatch.setattr(trt, "entry_of", lambda *_: entry)
    monkeypatch.setattr(trt, "engine_paths", lambda *_: [tmp_path / "x.engine"])
    manifest = type("Any", (), {"with_entry": lambda *_: None})()
    component = TensorRTBackend(library).load_variant(
        tmp_path, manifest, "transformer", device, plugins=True
    )
    oracle = DenoiserModule(random_transformer(CONFIG, torch.float32))
    tolerance = 2e-2 if dtype == torch.float16 else 2e-1  # 11 and 8 bits
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch, tokens in ((1, 256), (2, 240), (4, 231), (1, 231)):
            inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=tokens)
            actual = component(**{name: each.to(device) for name, each in inputs.items()}).cpu()
            with torch.no_grad():
                expected = oracle(**inputs)
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
