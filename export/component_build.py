"""One component from its plan to checked engine files: reference, graph, engine, gate.

The gate runs the engine itself where its backend works on this machine. Where it does not (an
engine for a GPU that is not here), the graph it was compiled from is run instead, and the manifest
says so.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.backends import default_device, get_backend, runs_here
from pixart_rt.backends.component import Component
from pixart_rt.backends.trt.backend import TensorRTBackend
from pixart_rt.bundle import ComponentEntry, Manifest, PluginVariant, hash_files
from pixart_rt.checkpoints.bundle_module import save_module
from pixart_rt.errors import ConfigError
from pixart_rt.export.activation_memory import measure_activations
from pixart_rt.export.component_spec import Part, Plan, Tensors, inputs_of_part
from pixart_rt.export.engines import EngineStats, build_aoti, build_tensorrt
from pixart_rt.export.numerics import (
    Difference,
    first_bad_layer,
    layer_outputs,
    onnx_layer_outputs,
    parity_record,
    require_parity,
    save_golden,
)
from pixart_rt.export.onnx_export import Graph, export_onnx, export_program, on_device
from pixart_rt.export.plugin_choice import choose, without_slower
from pixart_rt.export.plugins.graph import (
    compile_kernels,
    export_with_plugins,
    kernels_of,
    with_functions,
)
from pixart_rt.inference.prompts import NULL_PROMPT
from pixart_rt.model.dtypes import DTYPES

WORK = ".work"  # graphs that a build needs and a bundle does not, below the bundle
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A part's engine file, its ONNX graph if it has one, and what building it took."""

    part: Part
    engine: Path
    onnx: Path | None
    stats: EngineStats | None


def compile_component(
    folder: Path,
    manifest: Manifest,
    plan: Plan,
    backend: str,
    targets: tuple[str, ...],
    step: Step,
    *,
    plugins: bool = False,
) -> tuple[ComponentEntry, dict[str, Any]]:
    """Compile a component into `folder` and check it; its manifest entry and the build's figures.

    With `plugins` its engines are built twice, without and with. Raises BuildError or, for a wrong
    output, NumericsError.
    """
    (folder / plan.component).mkdir()
    step("float32 reference")
    engine_runs = runs_here(backend, targets)
    profiled = backend.startswith("tensorrt")
    # Small shapes lie outside a profile. Where the engine cannot run, its graph is, on the small.
    cases = plan.profile_cases if profiled and engine_runs else plan.cases
    golden = plan.profile_cases[0]
    empty = [] if plan.empty_prompt is None else [plan.empty_prompt()]
    outputs = run_parts(plan, [*cases, golden, *empty], torch.float32)
    references, stored = outputs[: len(cases)], outputs[len(cases)]
    for inputs, embeds in zip(empty, outputs[len(cases) + 1 :], strict=True):
        mask = inputs["attention_mask"]
        save_file({"embeds": embeds.contiguous(), "mask": mask}, folder / NULL_PROMPT)
    save_golden(folder / "golden" / f"{plan.component}.safetensors", golden, stored)
    compiled = [_compile_part(folder, plan, part, backend, targets, step) for part in plan.parts]
    files = [path for path in (folder / plan.component).rglob("*") if path.is_file()]
    entry = ComponentEntry(
        backend=backend,
        precision=plan.label,
        parts=tuple(item.engine.relative_to(folder).as_posix() for item in compiled),
        files=hash_files(folder, files),
        targets=targets if profiled else (),
        profiles=plan.profiles if profiled else [],
    )
    step("numerics gate")
    checked = list(zip(cases, references, strict=True))
    if engine_runs:
        runner = _engine_runner(folder, manifest.with_entry(plan.component, entry), plan.component)
    else:
        runner = _graph_runner(plan, compiled)
    entry = replace(entry, parity=_gate(plan, compiled, checked, *runner))
    step("memory")
    entry = replace(entry, memory=measure_activations(folder, manifest, plan, entry, engine_runs))
    if plugins:
        entry, more = _add_plugins(folder, manifest, plan, entry, checked, engine_runs, step)
        compiled += more
    shutil.rmtree(folder / WORK, ignore_errors=True)
    peaks = [item.stats.peak_bytes for item in compiled if item.stats is not None]
    stats = {
        "bytes": sum((folder / name).stat().st_size for name in entry.files),
        **({"engine_peak_bytes": max(peaks)} if peaks else {}),
    }
    return entry, stats


def run_parts(plan: Plan, cases: list[Tensors], dtype: torch.dtype) -> list[Tensor]:
    """A component in plain PyTorch in `dtype`, part after part, on the GPU if there is one.

    Float32 is exact float32: no TF32 in matrix products or convolutions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outputs: list[Tensor | None] = [None] * len(cases)
    for part in plan.parts:
        module = part.make(dtype).module.to(device)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            for index, inputs in enumerate(cases):
                feed = inputs_of_part(inputs, outputs[index])
                outputs[index] = module(**{k: v.to(device) for k, v in feed.items()}).cpu()
        del module
        gc.collect()
    return [output for output in outputs if output is not None]


def _compile_part(
    folder: Path, plan: Plan, part: Part, backend: str, targets: tuple[str, ...], step: Step
) -> Compiled:
    place = folder / plan.component
    label = f" {part.name}" if len(plan.parts) > 1 else ""
    graph = part.make(DTYPES[plan.precision])
    if backend.startswith("torch"):
        step("weights")
        save_module(place, graph.module, part.config())
        return Compiled(part, place / "model.safetensors", None, None)
    step(f"export{label}")
    if backend == "aoti":
        program = export_program(on_device(graph, default_device(backend)))
        step(f"compile{label}")
        engine = place / f"{part.name}.pt2"
        return Compiled(part, engine, None, build_aoti(program, engine))
    if backend.startswith("onnxruntime"):
        engine = place / f"{part.name}.onnx"
        export_onnx(graph, engine)
        return Compiled(part, engine, engine, None)
    if not backend.startswith("tensorrt"):
        raise ConfigError(f"backend {backend} has no engine builder")
    onnx = folder / WORK / f"{plan.component}-{part.name}.onnx"
    onnx.parent.mkdir(exist_ok=True)
    export_onnx(graph, onnx)
    del graph
    gc.collect()
    step(f"compile{label}")
    engine = place / f"{part.name}.engine"
    stats = build_tensorrt(onnx, engine, library=backend, profiles=plan.profiles, targets=targets)
    return Compiled(part, engine, onnx, stats)


def _add_plugins(
    folder: Path,
    manifest: Manifest,
    plan: Plan,
    entry: ComponentEntry,
    checked: list[tuple[Tensors, Tensor]],
    engine_runs: bool,
    step: Step,
) -> tuple[ComponentEntry, list[Compiled]]:
    """The entry of a component with its engines with plugins next to the plain ones, checked.

    Where they run here both are timed, and slower ones that are for this GPU alone are removed.
    """
    step("the same with plugins")
    built = [_compile_with_plugins(folder, plan, part, entry) for part in plan.parts]
    engines = [item.engine for item in built]
    parts = tuple(path.relative_to(folder).as_posix() for path in engines)
    variant = PluginVariant(parts=parts, parity={})
    files = {**entry.files, **hash_files(folder, engines)}
    entry = replace(entry, files=files, plugins=variant)
    full = manifest.with_entry(plan.component, entry)
    if engine_runs:
        runner = _engine_runner(folder, full, plan.component, plugins=True)
        parity = _gate(plan, built, checked, *runner)
    elif plan.precision == "bf16":
        how = "engine not run (no device), nor its graph: ONNX Runtime has no bfloat16"
        parity = {"how": how}
    else:
        parity = _gate(plan, built, checked, *_graph_runner(plan, built))
    entry = replace(entry, plugins=replace(variant, parity=parity))
    if engine_runs:
        step("timing both")
        entry = choose(folder, manifest.with_entry(plan.component, entry), plan.component)
        entry = without_slower(folder, entry)
    return entry, built


def _compile_with_plugins(folder: Path, plan: Plan, part: Part, entry: ComponentEntry) -> Compiled:
    """A second engine of a part, whose graph keeps operators that run our own kernels."""
    name = f"{part.name}-plugins"
    onnx = folder / WORK / f"{plan.component}-{name}.onnx"
    defined = onnx.with_name(f"{plan.component}-{name}-defined.onnx")  # what ONNX Runtime can run
    export_with_plugins(part.make(DTYPES[plan.precision]), onnx)
    gc.collect()
    with_functions(onnx, defined)
    usual = plan.profiles[0]
    tokens = usual["batch"][1] * usual["num_tokens"][1]
    kernels = compile_kernels(kernels_of(onnx), entry.targets, tokens)
    engine = folder / plan.component / f"{name}.engine"
    stats = build_tensorrt(
        onnx, engine, library=entry.backend, profiles=plan.profiles, targets=entry.targets,
        kernels=kernels,
    )  # fmt: skip
    return Compiled(part, engine, defined, stats)


def _gate(
    plan: Plan,
    compiled: list[Compiled],
    checked: list[tuple[Tensors, Tensor]],
    how: str,
    run: Callable[[Tensors], Tensor],
) -> dict[str, Any]:
    """Compare every case with its reference; the record of the worst for the manifest."""
    worst: tuple[Difference, Tensors] | None = None
    for inputs, reference in checked:
        layer = partial(locate, plan, compiled, inputs)
        found = require_parity(plan.component, plan.label, run(inputs), reference, layer)
        if worst is None or found.maximum > worst[0].maximum:
            worst = (found, inputs)
    assert worst is not None
    shapes = {name: list(tensor.shape) for name, tensor in worst[1].items()}
    return parity_record(worst[0], how, shapes)


def _engine_runner(
    folder: Path, manifest: Manifest, component: str, *, plugins: bool = False
) -> tuple[str, Callable[[Tensors], Tensor]]:
    """The engine itself, on the GPU if there is one; with plugins the one that has them."""
    name = manifest.components[component].backend
    device = default_device(name)
    if plugins:
        engine: Component = TensorRTBackend(name).load_variant(
            folder, manifest, component, device, plugins=True
        )
    else:
        engine = get_backend(name).load(folder, manifest, component, device)

    def run(inputs: Tensors) -> Tensor:
        return engine(**{name: tensor.to(device) for name, tensor in inputs.items()}).cpu()

    return f"engine run by {name}", run


def _graph_runner(plan: Plan, compiled: list[Compiled]) -> tuple[str, Callable[[Tensors], Tensor]]:
    """How a graph is run where its engine cannot be: ONNX Runtime, or PyTorch for bfloat16."""
    if plan.precision == "bf16":  # ONNX Runtime's CPU kernels do not know it
        how = "engine not run (no device); its module run by PyTorch in bfloat16"
        return how, lambda inputs: run_parts(plan, [inputs], torch.bfloat16)[0]

    def run(inputs: Tensors) -> Tensor:
        import onnxruntime

        output = None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of constants that it could have folded
        for item in compiled:
            feed = {name: value.numpy() for name, value in inputs_of_part(inputs, output).items()}
            session = onnxruntime.InferenceSession(
                str(item.onnx), options, providers=["CPUExecutionProvider"]
            )
            output = torch.from_numpy(session.run(None, feed)[0])
            del session
        assert output is not None
        return output

    return "engine not run (no device); its graph run by ONNX Runtime on the CPU", run


def locate(plan: Plan, compiled: list[Compiled], inputs: Tensors) -> str:
    """The first layer that differs from float32, looked for part by part on a failing input.

    Every part gets the reference's own input, so that an error is not charged to its successors.
    """
    previous = None
    for item in compiled:
        feed = inputs_of_part(inputs, previous)
        reference = item.part.make(torch.float32)
        expected = layer_outputs(reference.module, feed)
        with torch.no_grad():
            previous = reference.module(**feed)
        graph = item.part.make(DTYPES[plan.precision])
        bad = first_bad_layer(plan.label, _actual_layers(item, graph, feed, plan), expected)
        if bad is not None:
            return f"{item.part.name}: {bad}" if len(compiled) > 1 else bad
    return "none alone: the engine differs from its own graph, or the error gathers over layers"


def _actual_layers(item: Compiled, graph: Graph, feed: Tensors, plan: Plan) -> Tensors:
    if item.onnx is None or plan.precision == "bf16":
        return layer_outputs(graph.module, feed)
    return onnx_layer_outputs(item.onnx, graph, feed)
