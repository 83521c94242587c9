"""peft's adapters switched off for a while: the model they were added to, in the same memory.

    ConsistencyDistillation(model, ..., adapter_off=lambda: adapter_off(model))

peft freezes what it switches off, and lets it train again when it is on. That is so inside the
block and after it; run it before the pass whose gradient is wanted, not between that and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.torchao_import import quiet_imports


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapters in `model` add nothing; an error switches them on too.

    Raises ConfigError for a model without adapters, BackendError where peft is not installed.
    """
    try:
        with quiet_imports():
            from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise BackendError(
            f"adapters were to be switched off, but peft is not installed ({error}); "
            "pip install peft"
        ) from error
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    if not layers:
        raise ConfigError("adapters were to be switched off in a model without any; add one first")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
