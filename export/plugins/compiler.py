"""The process in which the kernels of plugins are compiled, for GPUs that need not be here.

A process of its own, because Triton reads its environment once: its interpreter must be off, and
line information, which would put paths of this machine into an engine, too. What is compiled is
what a launcher of kernels/ would launch (`launch.record`), with pointers instead of tensor
descriptors, which a plugin cannot make.

request  {"kernels": [KernelSpec as text], "targets": ["sm80"], "tokens": rows of a usual call}
answer   {"kernels": {KernelSpec as text: its packed images in base64}} or {"error"}
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from pixart_rt.backends.trt.plugin_kernels import (
    OPERATORS,
    SCRATCH,
    KernelImage,
    KernelSpec,
    Parameter,
    pack,
)
from pixart_rt.export.worker.protocol import Refused, serve
from pixart_rt.kernels.attention import attention_triton
from pixart_rt.kernels.codegen import ast_source
from pixart_rt.kernels.launch import Launch, interpreting, record
from pixart_rt.kernels.ln_modulate import ln_modulate_triton

ROW = 1  # of the example: like every number that a call decides, no multiple of 16


def main() -> None:
    """Answer one request."""
    serve(lambda request: {"kernels": compile_all(request)})


def compile_all(request: dict[str, Any]) -> dict[str, str]:
    """Every kernel of a request for every target, packed, in base64."""
    if interpreting():
        raise Refused("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    answer = {}
    for text in request["kernels"]:
        spec = KernelSpec.from_text(text)
        images = [compile_kernel(spec, each, request["tokens"]) for each in request["targets"]]
        answer[text] = base64.b64encode(pack(images)).decode()
    return answer


def compile_kernel(spec: KernelSpec, target: str, tokens: int) -> KernelImage:
    """The kernel of a spec for a target such as "sm80", configured for calls of `tokens` rows."""
    inputs = example(spec, tokens | 1)  # odd, so that nothing is compiled in about the count
    number = int(target.removeprefix("sm"))
    with record(divmod(number, 10)) as launches:
        _call(spec, inputs)
    (launch,) = launches
    source, options = ast_source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    metadata = compiled.metadata
    image = KernelImage(
        target=target,
        name=metadata.name,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        rows=launch.kwargs["ROWS" if spec.op == "ln_modulate" else "BLOCK_M"],
        parameters=(),
        binary=compiled.asm["cubin"],
    )
    planned = OPERATORS[spec.op].launch(image, inputs[0].shape, ROW, [0] * len(inputs), 0, 0)
    assert planned.grid == (*launch.grid, 1, 1)[:3], (planned.grid, launch.grid)
    image = replace(image, parameters=_parameters(launch, planned.values))
    _check(image, metadata, compiled.asm["ptx"])
    return image


def example(spec: KernelSpec, tokens: int) -> tuple[Tensor, ...]:
    """The inputs of a node for one image of `tokens` tokens; their memory is never touched."""
    dtypes = [getattr(torch, name) for name in spec.dtypes]
    if spec.op == "attention_qkv_packed":
        return (torch.empty(1, tokens, 3, *spec.sizes, dtype=dtypes[0]),)
    D, R = spec.sizes
    shapes = ((1, tokens, D), (R, D), (1, R, D))
    return tuple(
        torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _call(spec: KernelSpec, inputs: tuple[Tensor, ...]) -> None:
    if spec.op == "attention_qkv_packed":
        attention_triton(inputs[0], {"DESCRIPTORS": 0})
    else:
        x, table, shared = inputs
        ln_modulate_triton(x, table, shared, ROW)


def _parameters(launch: Launch, planned: dict[str, int]) -> tuple[Parameter, ...]:
    """The parameters that are left in compiled code, with the values that no call changes."""
    found = []
    for name, value, specialized in _flat(launch):
        if value is None or (specialized and type(value) is int and value == 1):
            continue  # compiled in
        if isinstance(value, Tensor):
            found.append(Parameter(name, "u64", None))
        elif name in planned:
            assert value == planned[name], (name, value, planned)
            assert value % 16, f"{name} = {value}: the code would rely on multiples of 16"
            found.append(Parameter(name, "u32", None))
        else:
            kind = "f32" if isinstance(value, float) else "u32"
            found.append(Parameter(name, kind, value))
    return tuple(found)


def _flat(launch: Launch) -> Iterator[tuple[str, Any, bool]]:
    """Every argument: its name, "layout.1" for an entry of a tuple, its value, and whether Triton
    may compile the value in."""
    for param, value in zip(launch.kernel.params, launch.args, strict=False):
        if param.is_constexpr:
            continue
        specialized = not param.do_not_specialize
        if isinstance(value, tuple):
            for index, entry in enumerate(value):
                yield f"{param.name}.{index}", entry, specialized
        else:
            yield param.name, value, specialized


def ptx_parameters(ptx: str) -> list[str]:
    """The kinds of an entry's parameters in order, as PTX declares them: ["u64", "u32", ...]."""
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    return re.findall(r"\.param\s+\.(\w+)", header)


def _check(image: KernelImage, metadata: Any, ptx: str) -> None:
    """What a launch from a plugin relies on; a version of Triton that breaks it is refused."""
    expected = [each.kind for each in image.parameters] + ["u64"] * SCRATCH
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)
    problems = {
        f"its parameters are {ptx_parameters(ptx)}, not {expected}": (
            ptx_parameters(ptx) != expected
        ),
        "it wants scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
        "it runs in clusters": metadata.num_ctas != 1,
        "it wants another number of threads": (
            threads is None or int(threads[1]) != 32 * image.num_warps
        ),
        "it takes tensor descriptors": bool(metadata.tensordesc_meta),
    }
    for problem, found in problems.items():
        if found:
            raise Refused(
                f"{image.name} for {image.target} cannot be a plugin: {problem} (triton "
                f"{triton.__version__}); build without --plugins"
            )


if __name__ == "__main__":
    main()
