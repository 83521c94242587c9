"""Weight-only quantization of a PyTorch component's linears, by torchao.

Weights are int8 or float8 (e4m3) with a scale for each output; activations and arithmetic keep the
component's precision. A bundle keeps the original weights: they are quantized when it is loaded, on
the CPU, one linear after the other, so that a GPU never sees more than the quantized ones.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pixart_rt.config import Weights
from pixart_rt.errors import BackendError
from pixart_rt.torchao_import import quiet_imports


def quantize_weights(module: nn.Module, weights: Weights) -> None:
    """Quantize the linears of a component's repeated layers, in place. FULL leaves them.

    Those are T5's layers (`layers`), the transformer's blocks (`blocks`) and a ControlNet's copies
    of them (`copies`): nearly all weights.
    What stands next to them is small and stays: embeddings, norms, caption projection, last layer.
    Raises BackendError where torchao is not installed.
    """
    if weights is Weights.FULL:
        return
    config = _config(weights)
    from torchao.quantization import quantize_

    quantize_(module, config, filter_fn=in_a_layer)


def in_a_layer(module: nn.Module, name: str) -> bool:
    """True for the linears that are quantized, by their dotted names."""
    words = name.split(".")
    return isinstance(module, nn.Linear) and not {"layers", "blocks", "copies"}.isdisjoint(words)


def _config(weights: Weights) -> Any:
    try:
        with quiet_imports():
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise BackendError(
            f"{weights} weights were requested, but torchao is not installed ({error}); "
            "pip install 'pixart_rt[quant]'"
        ) from error
    kind = Int8WeightOnlyConfig if weights is Weights.INT8 else Float8WeightOnlyConfig
    return kind(set_inductor_config=False)  # the process's compiler settings are not ours
