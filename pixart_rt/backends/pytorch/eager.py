"""PyTorch as it is: the oracle of all other backends, on any device.

The component's folder holds config.json and model.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pixart_rt.backends.component import Availability, Component
from pixart_rt.backends.engine_files import (
    Chain,
    FunctionPart,
    check_device,
    entry_of,
    forms_of,
    part_inputs,
)
from pixart_rt.backends.pytorch.offload import Offloaded
from pixart_rt.bundle import Manifest
from pixart_rt.config import Kernels, Quality


class EagerBackend:
    """Modules without a compiler."""

    name = "torch"

    def available(self) -> Availability:
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        return Availability(True, f"torch {torch.__version__} on {place}")

    def load(
        self,
        bundle: Path,
        manifest: Manifest,
        name: str,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> Component:
        """As Backend.load. `offload`: its weights are on the device only while it runs."""
        if offload:
            check_device(device)
            module = load_on(bundle, manifest, name, torch.device("cpu"))
            return Chain(name, [FunctionPart(Offloaded(module, device), part_inputs(name, 0))])
        module = load_on(bundle, manifest, name, device)
        controlled = manifest.control is not None
        parts = [FunctionPart(module, part_inputs(name, 0, controlled=controlled))]
        cacheable = module if name == "transformer" and not controlled else None
        return Chain(name, parts, forms_of(name), module, True, cacheable)


def load_on(bundle: Path, manifest: Manifest, name: str, device: torch.device) -> torch.nn.Module:
    """The module of a component on `device`, in the precision it was written with.

    Weights that the bundle wants quantized are, on the CPU, before they go to the device. A
    transformer runs the fused operators on a GPU, and in fp8 anywhere; a VAE decoder on a GPU. No
    parameter requires a gradient, so that the self-test of the kernels compiles no backward.
    """
    from pixart_rt.checkpoints.bundle_module import (  # diffusers: seconds to import
        DenoiserModule,
        load_module,
    )
    from pixart_rt.model.quantize import quantize_weights
    from pixart_rt.model.vae import VaeDecoder

    check_device(device)
    entry_of(bundle, manifest, name)
    weights = manifest.weights_of(name)
    module = load_module(Path(bundle) / name, name)
    quantize_weights(module, weights)
    module = module.to(device).requires_grad_(False)  # before `use`, which tests by it
    if isinstance(module, DenoiserModule):
        quality = manifest.quality
        fused = device.type == "cuda" or quality is Quality.FAST
        module.core.use(Kernels.FUSED if fused else Kernels.REFERENCE, quality, weights)
    if isinstance(module, VaeDecoder):
        module.use(Kernels.FUSED if device.type == "cuda" else Kernels.REFERENCE)
    return module
