"""The numerics gate: outputs against float32 PyTorch, and the first layer that differs.

An error is relative to the reference: its root mean square over the reference's, and its largest
element over the reference's standard deviation. The bounds are for one forward pass:

    fp32   rms 1e-4   max 1e-3     different summation order only
    fp16   rms 1e-2   max 5e-2     11 bits; 28 layers measured near rms 2e-3
    bf16   rms 5e-2   max 3e-1     8 bits
    fp8    rms 2e-1   max 1.5      the linears' inputs 4 bits, the rest as its dtype

and, where only the weights are quantized, of a component in any precision (see docs/memory.md):

    int8-weights   rms 1e-1   max 6e-1
    fp8-weights    rms 2e-1   max 1.5
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixart_rt.backends import default_device, get_backend, runs_here
from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.errors import NumericsError, PixArtError
from pixart_rt.export.onnx_export import Graph

BOUNDS = {
    "fp32": (1e-4, 1e-3),
    "fp16": (1e-2, 5e-2),
    "bf16": (5e-2, 3e-1),
    "fp8": (2e-1, 1.5),
    "int8-weights": (1e-1, 6e-1),
    "fp8-weights": (2e-1, 1.5),
}
GOLDEN_ELEMENTS = 1 << 15  # of a reference output that a bundle keeps


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an output is from its reference."""

    rms: float
    maximum: float
    finite: bool

    def within(self, precision: str) -> bool:
        rms, maximum = BOUNDS[precision]
        return self.finite and self.rms <= rms and self.maximum <= maximum

    def __str__(self) -> str:
        values = f"rms error {self.rms:.2e}, largest {self.maximum:.2e} of the reference's spread"
        return values if self.finite else f"NaN or Inf in the output; {values}"


def difference(output: Tensor, reference: Tensor) -> Difference:
    """Relative errors of an output, in float64; a shape that differs is our own mistake."""
    assert output.shape == reference.shape, (output.shape, reference.shape)
    output, reference = output.double(), reference.double()
    finite = bool(output.isfinite().all())
    error = (output - reference).nan_to_num(nan=float("inf"), posinf=float("inf"))
    spread = reference.std().clamp(min=1e-12)
    rms = error.square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-12)
    return Difference(float(rms), float(error.abs().max() / spread), finite)


def require_parity(
    component: str,
    precision: str,
    output: Tensor,
    reference: Tensor,
    find_layer: Callable[[], str],
) -> Difference:
    """The difference, or a NumericsError that names the component and its first bad layer."""
    found = difference(output, reference)
    if not found.within(precision):
        rms, maximum = BOUNDS[precision]
        raise NumericsError(
            f"{component} in {precision} failed the numerics gate: {found} (bounds {rms:g} and "
            f"{maximum:g}); first bad layer: {find_layer()}; choose another --precision"
        )
    return found


def observed_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers a report may name, in the order they run: blocks and what stands next to them."""
    layers = {}
    for name, child in module.named_modules():
        parent = module.get_submodule(name.rpartition(".")[0]) if "." in name else module
        is_block = isinstance(parent, nn.ModuleList) and name.count(".") <= 2
        beside = name.count(".") <= 1 and not isinstance(child, nn.ModuleList)
        if name and (is_block or (beside and not any(True for _ in child.children()))):
            layers[name] = child
    return layers


def layer_outputs(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each observed layer's output in a run of `module`, in float32."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, out, name=name: outputs.__setitem__(name, _last(out).float())
        )
        for name, layer in observed_layers(module).items()
    ]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _last(output: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    """The tensor that a layer computes last, as its last node in a graph does."""
    if isinstance(output, Tensor):
        return output
    return [each for each in output if each is not None][-1]


def first_bad_layer(
    precision: str, actual: dict[str, Tensor], expected: dict[str, Tensor]
) -> str | None:
    """The first layer, in running order, whose output breaks the bound, and by how much."""
    for name, reference in expected.items():
        if name in actual:
            found = difference(actual[name], reference)
            if not found.within(precision):
                return f"{name} ({found})"
    return None


def onnx_layer_outputs(
    onnx_path: Path, graph: Graph, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Each observed layer's output in the ONNX graph, run by ONNX Runtime on the CPU."""
    import onnx
    import onnxruntime

    model = onnx.load(onnx_path, load_external_data=False)
    last: dict[str, str] = {}
    names = observed_layers(graph.module)
    for node in model.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}
        inside = json.loads(scopes.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))
        last.update({name: node.output[0] for name in inside if name in names})
    existing = {value.name for value in model.graph.output}
    for value in sorted(set(last.values()) - existing):
        model.graph.output.append(onnx.ValueInfoProto(name=value))
    path = onnx_path.with_name("layers.onnx")
    onnx.save(model, path)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        values = session.run(list(last.values()), feed)
    finally:
        path.unlink()
    return {name: torch.from_numpy(value).float() for name, value in zip(last, values, strict=True)}


# What a bundle keeps so that `pixart-rt verify` can repeat the gate without the checkpoint.


def save_golden(path: Path, inputs: dict[str, Tensor], reference: Tensor) -> None:
    """Inputs and a thinned-out float32 reference output of one gate run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"input.{name}": tensor.contiguous() for name, tensor in inputs.items()}
    save_file({**tensors, "reference": _thin(reference)}, path)


def _thin(output: Tensor) -> Tensor:
    step = max(1, output.numel() // GOLDEN_ELEMENTS) | 1  # odd: no column is always skipped
    return output.flatten()[::step].contiguous()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `pixart-rt verify`. `ok` is None for a check that could not run here."""

    name: str
    ok: bool | None
    detail: str


def verify_bundle(
    path: Path, progress: Callable[[str, int, int], None] | None = None
) -> list[CheckResult]:
    """Check every file's hash, then every component's output against its stored reference.

    Raises BundleError when there is no readable manifest.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    names = list(manifest.components)
    results = []
    if progress:
        progress("files", 0, len(names) + 1)
    damaged = damaged_files(path, manifest)
    detail = ", ".join(f"{name} is {state}" for name, state in damaged.items())
    results.append(
        CheckResult("files", not damaged, detail or f"{len(manifest.all_files())} files unchanged")
    )
    for done, name in enumerate(names, start=1):
        if progress:
            progress(name, done, len(names) + 1)
        in_component = [file for file in damaged if file.startswith((f"{name}/", "golden/"))]
        if in_component:
            results.append(CheckResult(name, False, "not run: its files are damaged"))
        else:
            results.append(_check_component(path, manifest, name))
    return results


def _check_component(path: Path, manifest: Manifest, name: str) -> CheckResult:
    entry = manifest.components[name]
    backend = get_backend(entry.backend)
    availability = backend.available()
    if not availability.ok:
        reason = f"{availability.reason}. {availability.fix}"
        return CheckResult(name, None, f"not run: {reason}".strip())
    if not runs_here(entry.backend, entry.targets):
        targets = ", ".join(entry.targets)
        return CheckResult(name, None, f"not run: built for {targets}, this GPU is another")
    golden = load_file(path / "golden" / f"{name}.safetensors")
    reference = golden.pop("reference")
    device = default_device(entry.backend)
    inputs = {key.removeprefix("input."): value.to(device) for key, value in golden.items()}
    try:
        output = backend.load(path, manifest, name, device)(**inputs)
    except PixArtError as error:
        return CheckResult(name, False, str(error))
    thinned = _thin(output.cpu().float())
    if thinned.shape != reference.shape:
        return CheckResult(name, False, f"the output is {list(output.shape)}, of another size")
    found = difference(thinned, reference)
    return CheckResult(name, found.within(entry.precision), f"{entry.backend}: {found}")


def parity_record(found: Difference, how: str, shapes: dict[str, list[int]]) -> dict[str, object]:
    """What the manifest keeps of a gate run."""
    return {**asdict(found), "how": how, "shapes": shapes}
