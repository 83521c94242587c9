"""PyTorch as it is: the oracle of all other backends, on any device.

The component's folder holds config.json and model.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pixart_rt.backends.base import Availability, Component
from pixart_rt.backends.parts import Chain, FunctionPart, check_device, entry_of, part_inputs
from pixart_rt.bundle import Manifest
from pixart_rt.config import Kernels, Quality


class EagerBackend:
    """Modules without a compiler."""

    name = "torch"

    def available(self) -> Availability:
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        return Availability(True, f"torch {torch.__version__} on {place}")

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        module = load_on(bundle, manifest, name, device)
        return Chain(name, [FunctionPart(module, part_inputs(name, 0))])


def load_on(bundle: Path, manifest: Manifest, name: str, device: torch.device) -> torch.nn.Module:
    """The module of a component on `device`, in the precision it was written with.

    A transformer runs the fused operators on a GPU, and in fp8 anywhere; a VAE decoder on a GPU.
    """
    from pixart_rt.model.load import DenoiserModule, load_module  # diffusers: seconds to import
    from pixart_rt.model.vae import VaeDecoder

    check_device(device)
    entry_of(bundle, manifest, name)
    module = load_module(Path(bundle) / name, name).to(device)
    if isinstance(module, DenoiserModule):
        quality = manifest.quality
        fused = device.type == "cuda" or quality is Quality.FAST
        module.core.use(Kernels.FUSED if fused else Kernels.REFERENCE, quality)
    if isinstance(module, VaeDecoder):
        module.use(Kernels.FUSED if device.type == "cuda" else Kernels.REFERENCE)
    return module
