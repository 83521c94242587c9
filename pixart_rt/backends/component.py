"""The protocols of a backend and of a component: one callable of keyword tensors.

model/signature.py has the tensors of every component. A component may take other forms of the same
input instead; it lists them in `also_takes`. Tensors are on the component's device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pixart_rt.bundle import Manifest


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend runs here; if not, why, and what would make it."""

    ok: bool
    reason: str
    fix: str = ""


class Component(Protocol):
    """A text encoder, denoiser or decoder: keyword tensors in, one tensor out."""

    also_takes: frozenset[str]
    capturable: bool

    def version(self) -> Hashable:
        """Changes whenever a weight does."""
        ...

    def __call__(self, **inputs: Tensor) -> Tensor: ...


class Backend(Protocol):
    """One way to run components. Backends hold no state; components do."""

    name: str

    def available(self) -> Availability:
        """Whether engines of this backend can run on this machine."""
        ...

    def load(self, bundle: Path, manifest: Manifest, name: str, device: torch.device) -> Component:
        """The component `name` of a bundle, ready to be called on `device`.

        Raises BundleError for a missing or damaged engine, BackendError where it cannot run here.
        """
        ...
