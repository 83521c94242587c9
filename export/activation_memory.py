"""The memory that a built component's activations take, measured on the machine of the build.

Engines that say what they reserve are believed. A component in PyTorch is measured as it is loaded;
of other engines the modules that they were compiled from are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pixart_rt.backends import default_device, get_backend
from pixart_rt.backends.trt.backend import TensorRTBackend
from pixart_rt.bundle import ActivationMemory, ComponentEntry, Manifest
from pixart_rt.export.component_spec import Plan, Tensors, inputs_of_part
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.model.dtypes import DTYPES


def measure_activations(
    folder: Path, manifest: Manifest, plan: Plan, entry: ComponentEntry, engine_runs: bool
) -> ActivationMemory:
    """The manifest's figures of a component that lies in `folder`."""
    device = default_device(entry.backend)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    if entry.backend.startswith("tensorrt") and engine_runs:
        full = manifest.with_entry(plan.component, entry)
        chain = TensorRTBackend(entry.backend).load_variant(
            folder, full, plan.component, device, plugins=False
        )
        reserved = max(part.activation_bytes for part in chain.parts)  # type: ignore[attr-defined]
        return ActivationMemory(how=f"reserved by {entry.backend}, {place}", peaks=[[0, reserved]])
    if entry.backend.startswith("torch"):
        # Eager for torch-compile too, which would compile for every size and fuses into less.
        full = manifest.with_entry(plan.component, replace(entry, backend="torch"))
        engine = get_backend("torch").load(folder, full, plan.component, device)
        peaks = [[size, _peak(engine, inputs, device)[0]]
                 for size, inputs in sorted(plan.memory_cases.items())]  # fmt: skip
        return ActivationMemory(how=f"torch, {place}", peaks=peaks)
    return ActivationMemory(how=f"its modules in torch, {place}", peaks=_of_modules(plan, device))


def _of_modules(plan: Plan, device: torch.device) -> list[list[int]]:
    """The peak of whichever part has the largest; one part is in memory at a time.

    On a CPU in float32, halved for half precision: there PyTorch is slow in float16, and its
    convolutions widen their inputs, which no engine does.
    """
    dtype = torch.float32 if device.type == "cpu" else DTYPES[plan.precision]
    shrink = dtype.itemsize // DTYPES[plan.precision].itemsize
    outputs, most = dict.fromkeys(plan.memory_cases), dict.fromkeys(plan.memory_cases, 0)
    for part in plan.parts:
        module = part.make(dtype).module.to(device)
        for size, inputs in plan.memory_cases.items():
            peak, outputs[size] = _peak(module, inputs_of_part(inputs, outputs[size]), device)
            most[size] = max(most[size], peak)
        del module
        gc.collect()
    return [[size, peak // shrink] for size, peak in sorted(most.items())]


def _peak(call: Callable[..., Any], inputs: Tensors, device: torch.device) -> tuple[int, Any]:
    """The peak of a second call, because a first one may make tables and workspaces that stay; and
    its output.
    """
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        output = call(**given)
        return peak_bytes(lambda: call(**given), device), output
