"""torch.compile with dynamic sizes: one compilation serves all aspect ratios.

Sizes are marked before each call, so a new token count finds the compiled code. What cannot be a
dynamic size decides how many compilations there are, each at the first call that needs it:

    transformer    one image, or more  ×  text absorbed (up to 64 tokens), or not  ×  with constant
                   rows (guidance with a prompt of one token, as the empty one is), or without    8
    text encoder   one prompt, or more                                                            2
    VAE decoder    one image, or more                                                             2

torch.compile treats sizes 0 and 1 as constants, and None apart from a tensor. The lengths of the
absorbed form are one dynamic size. One image with several rows, a guided one whose negative prompt
has several tokens, is passed as several images, which costs it the first self-attention twice.

A call outside torch.inference_mode compiles once more what was compiled inside, and the opposite;
on a CPU PyTorch takes another convolution for small inputs, which the VAE compiles apart. LIMIT has
room for these. Reaching it means that an input varies in a way this file does not know, and is an
error; torch.compile would run such calls eagerly from then on, without a word.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart_rt.backends.component import Availability, Component
from pixart_rt.backends.engine_files import Chain, FunctionPart, forms_of, part_inputs
from pixart_rt.backends.pytorch.eager import load_on
from pixart_rt.bundle import Manifest
from pixart_rt.errors import BackendError
from pixart_rt.model.signature import ABSORBED_FORM, CONTROLNET, SIGNATURES

COMPILATIONS = {"transformer": 8, "text_encoder": 2, "vae_decoder": 2}  # the table above
LIMIT = 16
DYNAMIC: dict[str, tuple[int, ...]] = {  # input -> axes that differ between calls
    name: tuple(axes)
    for signature in SIGNATURES.values()
    for name, axes in signature.dynamic(CONTROLNET, ABSORBED_FORM).items()
}
OF_IMAGES = tuple(  # inputs of the transformer with a row for each image
    row.name for row in SIGNATURES["transformer"].inputs if row.dims[0] == "batch"
)


class CompiledBackend:
    """The eager backend's files through TorchInductor."""

    name = "torch-compile"

    def __init__(self, compiler: str | Callable[..., Any] = "inductor") -> None:
        """compiler: torch.compile's backend."""
        self._compiler = compiler

    def available(self) -> Availability:
        if torch.cuda.is_available():
            if importlib.util.find_spec("triton") is None:
                return Availability(
                    False, "torch.compile needs Triton on a GPU", "pip install triton"
                )
            return Availability(True, f"TorchInductor on {torch.cuda.get_device_name()}")
        if not has_compiler():
            return Availability(
                False,
                "torch.compile needs a C++ compiler on a CPU and found none",
                "install g++ (apt-get install g++) or set CXX",
            )
        return Availability(True, "TorchInductor on the CPU")

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        module = load_on(bundle, manifest, name, device)
        call = Compiled(name, module, self._compiler)
        names = part_inputs(name, 0, controlled=manifest.control is not None)
        return Chain(name, [FunctionPart(call, names)], forms_of(name), module, True)


class Compiled:
    """A component's module, compiled at its first calls. Serves one thread."""

    def __init__(self, name: str, module: nn.Module, compiler: str | Callable[..., Any]) -> None:
        self._name, self._limit = name, LIMIT
        self._compiled = torch.compile(_own_forward(module), backend=compiler)
        self._limited = torch._dynamo.config.patch(
            recompile_limit=self._limit, fail_on_recompile_limit_hit=True
        )

    def __call__(self, **inputs: Tensor) -> Tensor:
        inputs = as_images(inputs)
        mark(inputs)
        try:
            with self._limited:
                output: Tensor = self._compiled(**inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            raise BackendError(
                f"the {self._name} was called with {shapes}, which need another compilation, but "
                f"there are {self._limit} already, more than there should ever be; use a bundle "
                "built with --backend torch, and report this as a bug"
            ) from error
        return output


def _own_forward(module: nn.Module) -> Callable[..., Tensor]:
    """`module.forward` with a code object of its own.

    torch.compile counts compilations by code object: those of two pipelines in one process, or of
    a module that somebody else compiles, would be added up.
    """
    forward: Any = type(module).forward
    own = types.FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(own, module)


def has_compiler() -> bool:
    """True where the C++ compiler exists that TorchInductor would use.

    TorchInductor's own answer costs 3 CPU seconds of imports, which `doctor` would wait for.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", usual)) is not None


def as_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's inputs with one image and several rows as an image for each row.

    Only without constant rows: row r is then image text_rows[r], which can be no other than 0.
    """
    rows = inputs.get("text_rows")
    if rows is None or len(inputs["tokens"]) > 1 or len(inputs["null_rows"]) or len(rows) == 1:
        return inputs
    changed = {
        name: inputs[name].expand(len(rows), -1, -1).contiguous()
        for name in OF_IMAGES
        if name in inputs
    }
    return {**inputs, **changed, "text_rows": torch.arange(len(rows), device=rows.device)}


def mark(inputs: dict[str, Tensor]) -> None:
    """Tell torch.compile which sizes vary. A size of 0 or 1 cannot: it is always specialised."""
    for name, tensor in inputs.items():
        for axis in DYNAMIC.get(name, ()):
            if tensor.shape[axis] > 1:
                torch._dynamo.mark_dynamic(tensor, axis)
