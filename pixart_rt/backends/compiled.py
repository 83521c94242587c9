"""torch.compile with dynamic sizes: one compilation serves all aspect ratios.

Sizes are marked before each call, so a new token count finds the compiled code. A batch of one is
compiled on its own, because torch.compile always treats 1 as a constant; so at most two
compilations a component, each at its first call.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from torch import Tensor

from pixart_rt.backends.base import Availability, Component
from pixart_rt.backends.eager import load_on
from pixart_rt.backends.parts import Chain, FunctionPart, forms_of, part_inputs
from pixart_rt.bundle import Manifest

DYNAMIC: dict[str, tuple[int, ...]] = {  # input -> axes that differ between calls
    "input_ids": (0, 1),
    "attention_mask": (0, 1),
    "tokens": (0, 1),
    "pos_embed": (0, 1),
    "modulation": (0,),
    "null_rows": (0,),
    "text_rows": (0,),
    "constant": (1,),
    "text_kv": (1,),
    "prompt_mask": (0,),
    "absorbed_keys": (1,),
    "absorbed_bias": (1,),
    "absorbed_values": (1,),
    "control": (0, 1),
    "latents": (0, 2, 3),
}


class CompiledBackend:
    """The eager backend's files through TorchInductor."""

    name = "torch-compile"

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
        compiled = torch.compile(module)

        def call(**inputs: Tensor) -> Tensor:
            mark(inputs)
            output: Tensor = compiled(**inputs)
            return output

        names = part_inputs(name, 0, controlled=manifest.control is not None)
        return Chain(name, [FunctionPart(call, names)], forms_of(name), module, True)


def has_compiler() -> bool:
    """Whether the C++ compiler that TorchInductor would use exists."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False


def mark(inputs: dict[str, Tensor]) -> None:
    """Tell torch.compile which sizes vary. A size of 1 cannot: it is always specialised."""
    for name, tensor in inputs.items():
        for axis in DYNAMIC.get(name, ()):
            if tensor.shape[axis] > 1:
                torch._dynamo.mark_dynamic(tensor, axis)
