"""Loading a pipeline's components, so that they share what they can.

One backend object serves all components of its name; TensorRT's holds the arena that its engines
share. Where the text encoder's weights are is decided here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pixart_rt.backends import default_device, get_backend
from pixart_rt.backends.component import Backend, Component
from pixart_rt.bundle import Manifest
from pixart_rt.config import TextPlace
from pixart_rt.errors import BackendError


class Loader:
    """Loads the components of one pipeline, which serves one thread.

    text_place: where the text encoder's weights are; None for what the bundle was built with.
    cuda_graphs: let TensorRT-RTX replay its engines as CUDA graphs.
    """

    def __init__(self, text_place: TextPlace | None = None, *, cuda_graphs: bool = False) -> None:
        self._text_place, self._cuda_graphs = text_place, cuda_graphs
        self._backends: dict[str, Backend] = {}

    def load(
        self, bundle: Path, manifest: Manifest, name: str, device: str | torch.device | None
    ) -> tuple[Component, torch.device]:
        """A component and its device: the one asked, else the GPU if its backend can use one.

        Raises BundleError and BackendError as Backend.load does.
        """
        kinds = {entry.backend for entry in manifest.components.values()}
        if self._cuda_graphs and "tensorrt-rtx" not in kinds:
            raise BackendError(
                f"CUDA graphs of TensorRT-RTX were requested, but {bundle} runs on "
                f"{', '.join(sorted(kinds))}; leave them out, or build with --backend tensorrt-rtx"
            )
        kind = manifest.components[name].backend
        place = torch.device(device or default_device(kind))
        backend = self._backend(kind)
        where = self._text_place or manifest.text_place
        if name == "text_encoder" and where is TextPlace.CPU:
            place = torch.device("cpu")
        if name == "text_encoder" and where is TextPlace.OFFLOAD:
            return self._offloaded(kind, bundle, manifest, name, place), place
        return backend.load(bundle, manifest, name, place), place

    def _backend(self, kind: str) -> Backend:
        if kind not in self._backends:
            backend = get_backend(kind)
            if self._cuda_graphs and kind == "tensorrt-rtx":
                from pixart_rt.backends.trt.backend import TensorRTBackend

                backend = TensorRTBackend(kind, cuda_graphs=True)
            self._backends[kind] = backend
        return self._backends[kind]

    def _offloaded(
        self, kind: str, bundle: Path, manifest: Manifest, name: str, place: torch.device
    ) -> Component:
        if kind != "torch":
            raise BackendError(
                f"offloading the text encoder was requested, but {bundle} has it in {kind}; only "
                "plain PyTorch can be moved: build with --text-encoder torch"
            )
        from pixart_rt.backends.pytorch.eager import EagerBackend

        return EagerBackend().load(bundle, manifest, name, place, offload=True)
