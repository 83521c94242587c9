"""One component from its plan to checked engine files: reference, graph, engine, gate.

The gate runs the engine itself where its backend works on this machine. Where it does not (an
engine for a GPU that is not here), the graph it was compiled from is run instead, and the manifest
says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.backends import default_device, get_backend, runs_here
from pixart_rt.bundle import ComponentEntry, Manifest, hash_files
from pixart_rt.errors import ConfigError
from pixart_rt.export.engine import EngineStats, build_aoti, build_tensorrt
from pixart_rt.export.graph import Graph, export_onnx, export_program, on_device
from pixart_rt.export.parts import DTYPES, Part, Plan
from pixart_rt.export.verify import (
    Difference,
    first_bad_layer,
    layer_outputs,
    onnx_layer_outputs,
    parity_record,
    require_parity,
    save_golden,
)
from pixart_rt.model.load import save_module
from pixart_rt.prompts import NULL_PROMPT

WORK = ".work"  # graphs that a build needs and a bundle does not, below the bundle
Tensors = dict[str, Tensor]
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
) -> tuple[ComponentEntry, dict[str, Any]]:
    """Compile a component into `folder` and check it; its manifest entry and the build's figures.

    Raises BuildError or, for a wrong output, NumericsError.
    """
    (folder / plan.component).mkdir()
    step("float32 reference")
    engine_runs = runs_here(backend, targets)
    profiled = backend.startswith("tensorrt")
    # Small shapes lie outside a profile. Where the engine cannot run, its graph is, on the small.
    cases = plan.profile_cases if profiled and engine_runs else plan.cases
    golden = plan.profile_cases[0]
    empty = [] if plan.empty_prompt is None else [plan.empty_prompt]
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
    if engine_runs:
        full = replace(manifest, components={**manifest.components, plan.component: entry})
        how, run = _engine_runner(folder, full, plan.component)
    else:
        how, run = _graph_runner(plan, compiled)
    checked = list(zip(cases, references, strict=True))
    parity = _gate(plan, compiled, checked, how, run)
    for item in compiled:
        if item.onnx is not None and item.onnx != item.engine:
            for path in item.onnx.parent.glob(f"{item.onnx.name}*"):
                path.unlink()
    work = folder / WORK
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
    peaks = [item.stats.peak_bytes for item in compiled if item.stats is not None]
    stats = {
        "bytes": sum(path.stat().st_size for path in files),
        **({"engine_peak_bytes": max(peaks)} if peaks else {}),
    }
    return replace(entry, parity=parity), stats


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
                feed = _feed(plan, inputs, outputs[index])
                outputs[index] = module(**{k: v.to(device) for k, v in feed.items()}).cpu()
        del module
        gc.collect()
    return [output for output in outputs if output is not None]


def _feed(plan: Plan, inputs: Tensors, previous: Tensor | None) -> Tensors:
    """The inputs of a part: the component's own, or the previous part's output and the mask."""
    if previous is None:
        return inputs
    return {"hidden": previous, "attention_mask": inputs["attention_mask"]}


def _compile_part(
    folder: Path, plan: Plan, part: Part, backend: str, targets: tuple[str, ...], step: Step
) -> Compiled:
    place = folder / plan.component
    label = f" {part.name}" if len(plan.parts) > 1 else ""
    graph = part.make(DTYPES[plan.precision])
    if backend.startswith("torch"):
        step("weights")
        save_module(place, graph.module, part.config)
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
    folder: Path, manifest: Manifest, component: str
) -> tuple[str, Callable[[Tensors], Tensor]]:
    """The engine itself, on the GPU if there is one."""
    backend = get_backend(manifest.components[component].backend)
    device = default_device(backend.name)
    engine = backend.load(folder, manifest, component, device)

    def run(inputs: Tensors) -> Tensor:
        return engine(**{name: tensor.to(device) for name, tensor in inputs.items()}).cpu()

    return f"engine run by {backend.name}", run


def _graph_runner(plan: Plan, compiled: list[Compiled]) -> tuple[str, Callable[[Tensors], Tensor]]:
    """How a graph is run where its engine cannot be: ONNX Runtime, or PyTorch for bfloat16."""
    if plan.precision == "bf16":  # ONNX Runtime's CPU kernels do not know it
        how = "engine not run (no device); its module run by PyTorch in bfloat16"
        return how, lambda inputs: run_parts(plan, [inputs], torch.bfloat16)[0]

    def run(inputs: Tensors) -> Tensor:
        import onnxruntime

        output = None
        for item in compiled:
            feed = {name: value.numpy() for name, value in _feed(plan, inputs, output).items()}
            session = onnxruntime.InferenceSession(
                str(item.onnx), providers=["CPUExecutionProvider"]
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
        feed = _feed(plan, inputs, previous)
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
