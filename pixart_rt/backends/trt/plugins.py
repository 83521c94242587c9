"""Operators as class-based TensorRT plugins (IPluginV3) that run our compiled Triton kernels.

Used twice: by the process that builds an engine, which gives each node of the graph its compiled
kernels, and by the process that runs it, where the engine gives them back. That process must
register the creators before it loads the engine. One class serves all operators; what differs is
in plugin_kernels.py. `trt` is tensorrt or tensorrt_rtx_bindings: the interface is the same.

TensorRT calls these methods from C++: an exception in one becomes a line on stderr and a refusal
without a reason, so the reason waits in `failure()` for the engine's own error.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pixart_rt.backends.trt.cuda_driver import Driver
from pixart_rt.backends.trt.plugin_kernels import (
    NAMESPACE,
    OPERATORS,
    VERSION,
    KernelSpec,
    arguments,
    unpack,
)
from pixart_rt.errors import BackendError

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # to TensorRT's names
_failures: list[str] = []  # why plugins failed, until the engine's caller asks
_registered: dict[str, list[Any]] = {}  # module -> its creators, which Python must keep alive


def register(trt: ModuleType, kernels: Mapping[str, bytes] | None = None) -> None:
    """Make the plugins known to a library, once a process.

    `kernels` maps the text of a KernelSpec to its packed images: what nodes of a graph are given.
    A process that only runs engines needs none.
    """
    if trt.__name__ in _registered:
        return
    registry = trt.get_plugin_registry()
    creators = [creator(trt, op, kernels or {}) for op in OPERATORS]
    for each in creators:
        if not registry.register_creator(each, NAMESPACE):
            raise BackendError(
                f"{trt.__name__} already has a plugin {each.name} in {NAMESPACE}; another copy of "
                "pixart_rt is loaded in this process"
            )
    _registered[trt.__name__] = creators


def failure() -> str:
    """Why plugins failed since this was last asked; empty if none did."""
    reasons = dict.fromkeys(_failures)
    _failures.clear()
    return "; ".join(reasons)


@contextmanager
def _noting_failures() -> Iterator[None]:
    try:
        yield
    except BackendError as error:
        _failures.append(str(error))
        raise


@functools.cache
def driver() -> Driver:
    """This process's CUDA driver, loaded when a plugin first needs it."""
    return Driver()


@functools.cache
def plugin_class(trt: ModuleType) -> Any:
    """The plugin's class over a library's base classes."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class TritonPlugin(*bases):  # type: ignore[misc]
        """One node: which operator, which row of the modulation, and the kernels."""

        def __init__(self, spec: KernelSpec, row: int, packed: bytes) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name = OPERATORS[spec.op].node
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.num_outputs = 1
            self.spec, self.row, self.packed = spec, row, packed
            self.images = unpack(packed)
            self.operator = OPERATORS[spec.op]

        def get_capability_interface(self, _type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return TritonPlugin(self.spec, self.row, self.packed)

        def get_output_data_types(self, inputs: Any) -> Any:
            return [inputs[0]]

        def get_output_shapes(self, inputs: Any, _shape_inputs: Any, builder: Any) -> Any:
            first = inputs[0]
            if self.spec.op == "ln_modulate":
                return [trt.DimsExprs(first)]
            width = self.spec.sizes[0] * self.spec.sizes[1]
            return [trt.DimsExprs([first[0], first[1], builder.constant(width)])]

        def supports_format_combination(self, at: int, tensors: Any, num_inputs: int) -> bool:
            """Dense row-major tensors of the dtypes that the kernel was compiled for."""
            desc = tensors[at].desc
            dtype = self.spec.dtypes[at if at < num_inputs else 0]
            linear = desc.format == trt.TensorFormat.LINEAR
            return bool(linear and desc.type == getattr(trt.DataType, DTYPES[dtype]))

        def configure_plugin(self, _inputs: Any, _outputs: Any) -> None:
            pass  # the kernels take any number of images and tokens

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, _tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: Any, _outputs: Any) -> int:
            return self.operator.workspace_bytes(tuple(inputs[0].max))

        def on_shape_change(self, _inputs: Any, _outputs: Any) -> None:
            pass

        def attach_to_context(self, _context: Any) -> Any:
            """A clone for one execution context; loads its kernel, before any graph capture."""
            with _noting_failures():
                driver().function(self.images)
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # A field holds an address, not its data: the plugin must keep what is read later.
            self._kept = self.spec.to_text().encode(), array("i", [self.row]), self.packed
            text, row, images = self._kept
            kinds = trt.PluginFieldType
            return trt.PluginFieldCollection(
                [
                    trt.PluginField("kernel", text, kinds.CHAR),
                    trt.PluginField("row", row, kinds.INT32),
                    trt.PluginField("images", images, kinds.CHAR),
                ]
            )

        def enqueue(
            self,
            input_desc: Any,
            _output_desc: Any,
            inputs: Any,
            outputs: Any,
            workspace: int,
            stream: int,
        ) -> None:
            with _noting_failures():
                image, function = driver().function(self.images)
                shape = tuple(input_desc[0].dims)
                launch = self.operator.launch(image, shape, self.row, inputs, outputs[0], workspace)
                packed = arguments(image, launch.values)
                driver().launch(function, image, launch.grid, packed, stream)

    return TritonPlugin


def creator(trt: ModuleType, op: str, kernels: Mapping[str, bytes]) -> Any:
    """The creator of an operator's plugin: from a graph's node, or from an engine's fields."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = OPERATORS[op].node
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            # What the parser reads from a node. Engines also have the kernels.
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField("kernel", b"", trt.PluginFieldType.CHAR),
                    trt.PluginField("row", b"", trt.PluginFieldType.INT32),
                ]
            )

        def create_plugin(self, _name: str, found: Any, phase: Any) -> Any:
            values = {field.name: bytes(field.data) for field in found}
            text = values["kernel"].rstrip(b"\0").decode()  # the parser adds a zero
            packed = kernels[text] if phase == trt.TensorRTPhase.BUILD else values["images"]
            row = int.from_bytes(values["row"][:4], "little") if "row" in values else 0
            return plugin_class(trt)(KernelSpec.from_text(text), row, packed)

    return Creator()
