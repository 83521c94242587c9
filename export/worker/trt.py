"""The process in which a TensorRT engine is built: ONNX in, engine out, nothing else.

A process of its own, because the library may abort or be killed for its memory, and because its
peak memory is then its own. The request is JSON on stdin, the answer JSON on stdout, and all that
the library says is on stderr. Imports no torch.

request  {"module", "onnx", "engine", "profiles": [{dimension: [min, opt, max]}], "targets": [..],
          "kernels": {KernelSpec as text: its packed images in base64}}
answer   {"peak_bytes", "version"} or {"error"}
"""

from __future__ import annotations

import base64
import importlib
import sys
from pathlib import Path
from typing import Any

from pixart_rt.backends.trt.plugins import register
from pixart_rt.export.worker.protocol import Refused, peak_memory, serve

Ranges = dict[str, list[int]]  # dimension name -> [min, opt, max]


def main() -> None:
    """Answer one request."""
    serve(lambda request: {"version": build(request), "peak_bytes": peak_memory()})


def build(request: dict[str, Any]) -> str:
    """Build the engine of a request; returns the library's version."""
    trt = importlib.import_module(request["module"])
    log = make_log(trt)
    if request["kernels"]:
        register(trt, {k: base64.b64decode(v) for k, v in request["kernels"].items()})
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["onnx"]):
        raise Refused(_parse_error(parser, request["onnx"]))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: the gate's bounds rely on it
    for ranges in request["profiles"]:
        _add_profile(builder, network, config, ranges)
    if request["targets"]:
        config.num_compute_capabilities = len(request["targets"])
        for index, target in enumerate(request["targets"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if not _serialize(trt, builder, network, config, Path(request["engine"])):
        raise Refused(log.errors[0] if log.errors else "the library gave no reason")
    return str(trt.__version__)


def make_log(trt: Any) -> Any:
    """A logger that writes warnings and worse to stderr and keeps the errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity not in (trt.ILogger.INFO, trt.ILogger.VERBOSE):
                print(message, file=sys.stderr, flush=True)

    return Log()


def _network_flags(trt: Any) -> int:
    """Strongly typed: the graph's own dtypes hold. A version that has no other way has no flag."""
    flags = trt.NetworkDefinitionCreationFlag.__members__
    return 1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0


def _parse_error(parser: Any, onnx: str) -> str:
    """The parser's first error, which later ones follow from, with its node."""
    if not parser.num_errors:
        return f"{onnx} was not parsed and the parser gave no reason"
    error = parser.get_error(0)
    where = ""
    if error.node() >= 0:
        where = f" at node {error.node()} {error.node_name()!r} ({error.node_operator()})"
    return f"{onnx} was not parsed{where}: {error.desc()}"


def _add_profile(builder: Any, network: Any, config: Any, ranges: Ranges) -> None:
    """One optimization profile: every dynamic axis of every input gets its dimension's range."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [list(tensor.shape) for _ in range(3)]
        for axis, size in enumerate(tensor.shape):
            if size >= 0:
                continue
            name = tensor.get_dimension_name(axis)
            if name not in ranges:
                raise Refused(
                    f"the profile has ranges for {sorted(ranges)}, but {tensor.name} axis {axis} "
                    f"is called {name!r}; give it a range"
                )
            for shape, value in zip(shapes, ranges[name], strict=True):
                shape[axis] = value
        profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise Refused(f"the library refused the profile {ranges}; is min <= opt <= max?")


def _serialize(trt: Any, builder: Any, network: Any, config: Any, engine: Path) -> bool:
    """Build straight into the file, which saves holding the engine in memory a second time."""
    if not hasattr(builder, "build_serialized_network_to_stream"):  # TensorRT before 10.9
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            engine.write_bytes(plan)
        return plan is not None

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = engine.open("wb")

        def write(self, data: bytes) -> int:
            return self.file.write(data)

    writer = Writer()
    with writer.file:
        return bool(builder.build_serialized_network_to_stream(network, config, writer))


if __name__ == "__main__":
    main()
