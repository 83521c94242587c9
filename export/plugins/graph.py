"""The graph of a transformer whose fused operators stay nodes, for TensorRT plugins to run.

`ln_modulate` and `attention_qkv_packed` become nodes of the domain pixart_rt; every other fused
operator is taken apart into standard ones, and so is attention where its kernel does not run
(float32, other head widths). No runtime but TensorRT knows such a graph: `with_functions` adds what
the nodes mean in standard operators, so that ONNX Runtime can check the rest.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from pixart_rt.backends.trt.plugin_kernels import NAMESPACE, OPERATORS, VERSION, KernelSpec
from pixart_rt.config import Kernels
from pixart_rt.errors import ConfigError
from pixart_rt.export.onnx_export import OPSET, Graph, export_onnx, quiet_exporter
from pixart_rt.export.plugins.compiler import example
from pixart_rt.export.worker.protocol import ask
from pixart_rt.kernels.attention import attention_qkv_packed_ref
from pixart_rt.kernels.attention_tiles import HEAD
from pixart_rt.kernels.decompositions import decompositions
from pixart_rt.kernels.ln_modulate import ln_modulate_ref
from pixart_rt.model.signature import BOUNDS
from pixart_rt.model.transformer import PixArtTransformer

COMPILER = "pixart_rt.export.plugins.compiler"
LEAST_TARGET = 80  # what attention's kernel needs
_OURS = torch.ops.pixart_rt


def check_plugin_targets(targets: Iterable[str]) -> None:
    """A ConfigError for a target that the kernels do not run on."""
    old = [target for target in targets if int(target.removeprefix("sm")) < LEAST_TARGET]
    if old:
        raise ConfigError(
            f"--plugins was requested for {', '.join(old)}, but its kernels need sm{LEAST_TARGET} "
            "or later; leave out --plugins or that target"
        )


def export_with_plugins(graph: Graph, path: Path) -> None:
    """Write a transformer's graph with plugin nodes as ONNX; its module is left fused."""
    for module in graph.module.modules():
        if isinstance(module, PixArtTransformer):
            module.use(Kernels.FUSED)
    export_onnx(graph, path, plugin_nodes())


def plugin_nodes() -> dict[Any, Callable[..., Any]]:
    """The operators that stay nodes, as decompositions that make those."""
    return {
        _OURS.ln_modulate.default: _ln_modulate_node,
        _OURS.attention_qkv_packed.default: _attention_node,
    }


def _node(spec: KernelSpec, inputs: tuple[Tensor, ...], row: int, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{NAMESPACE}::{OPERATORS[spec.op].node}",
        inputs,
        attrs={
            "kernel": spec.to_text(),
            "row": row,
            "plugin_namespace": NAMESPACE,
            "plugin_version": VERSION,
        },
        dtype=inputs[0].dtype,
        shape=shape,
        version=int(VERSION),
    )


def _spec(op: str, inputs: tuple[Tensor, ...], *sizes: int) -> KernelSpec:
    names = tuple(str(each.dtype).removeprefix("torch.") for each in inputs)
    return KernelSpec(op=op, dtypes=names, sizes=sizes)


def _ln_modulate_node(
    x: Tensor,
    table: Tensor,
    shared: Tensor,
    row: int,
    lossless: bool,
    out_dtype: torch.dtype | None,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """y, and nothing for the statistics, which only a backward reads."""
    assert not lossless and out_dtype in (None, x.dtype), "engines have quality high, one dtype"
    inputs = (x, table, shared)
    spec = _spec("ln_modulate", inputs, x.shape[-1], table.shape[0])
    return _node(spec, inputs, row, x.shape), x.new_empty(0)


def _attention_node(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, H, K = qkv.shape
    if qkv.dtype not in (torch.float16, torch.bfloat16) or K != HEAD:
        plain: tuple[Tensor, Tensor] = decompositions()[_OURS.attention_qkv_packed.default](qkv)
        return plain
    spec = _spec("attention_qkv_packed", (qkv,), H, K)
    return _node(spec, (qkv,), 0, (B, N, H * K)), qkv.new_empty(0)


def kernels_of(path: Path) -> list[str]:
    """The kernels, as text of their specs, that the nodes of a graph name."""
    model = onnx.load(path, load_external_data=False)
    return sorted({_attributes(node)["kernel"] for node in _nodes(model)})


def compile_kernels(specs: Iterable[str], targets: Iterable[str], tokens: int) -> dict[str, bytes]:
    """Packed images of kernels for targets; `tokens` is the row count they are configured for.

    Raises BuildError with Triton's reason.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    request = {"kernels": list(specs), "targets": list(targets), "tokens": tokens}
    answer, _ = ask(COMPILER, request, "a plugin's kernel", environment=environment)
    return {text: base64.b64decode(packed) for text, packed in answer["kernels"].items()}


def with_functions(path: Path, out: Path) -> None:
    """Write the graph at `path` to `out`, in the same folder, with its plugin nodes defined.

    Each distinct node becomes a function whose body is the operator's reference, exported.
    """
    model = onnx.load(path, load_external_data=False)
    made: dict[str, onnx.FunctionProto] = {}
    for node in _nodes(model):
        values = _attributes(node)
        spec, row = KernelSpec.from_text(values["kernel"]), values["row"]
        name = "_".join([node.op_type, *spec.dtypes, *map(str, spec.sizes), str(row)])
        if name not in made:
            made[name] = _function(name, spec, row)
        node.op_type = name
        del node.attribute[:]
    model.functions.extend(made.values())
    onnx.save(model, out)


def _nodes(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.domain == NAMESPACE]


def _attributes(node: Any) -> dict[str, Any]:
    """A node's attributes, text as text."""
    values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


class _Reference(nn.Module):
    """What a node means, in plain PyTorch."""

    def __init__(self, op: str, row: int) -> None:
        super().__init__()
        self.op, self.row = op, row

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if self.op == "ln_modulate":
            x, table, shared = inputs
            return ln_modulate_ref(x, table, shared, self.row)
        return attention_qkv_packed_ref(inputs[0])


def _function(name: str, spec: KernelSpec, row: int) -> onnx.FunctionProto:
    """A node's meaning as a function of standard operators, for any number of images and tokens."""
    one_image = example(spec, 59)
    batched = {0} if spec.op == "attention_qkv_packed" else {0, 2}  # x and shared
    inputs = [
        torch.zeros_like(each.expand(2, *each.shape[1:]) if at in batched else each)
        for at, each in enumerate(one_image)
    ]
    batch, tokens = (
        Dim(name, min=BOUNDS[name][0], max=BOUNDS[name][1]) for name in ("batch", "num_tokens")
    )
    dims: list[dict[int, Dim]] = [{0: batch} if at in batched else {} for at in range(len(inputs))]
    dims[0][1] = tokens
    with quiet_exporter():
        exported = torch.onnx.export(
            _Reference(spec.op, row), (inputs,), dynamic_shapes=(dims,),
            dynamo=True, opset_version=OPSET, verbose=False,
        )  # fmt: skip
    assert exported is not None
    body = exported.model_proto.graph
    constants = [
        helper.make_node("Constant", [], [weight.name], value=weight) for weight in body.initializer
    ]
    return helper.make_function(
        NAMESPACE, name,
        [value.name for value in body.input], [value.name for value in body.output],
        [*constants, *body.node], [helper.make_opsetid("", OPSET)],
    )  # fmt: skip
