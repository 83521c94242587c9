"""Bytes of a component's weights: of the module that a configuration builds, or of engine files.

Quantized, a linear of I inputs and O outputs takes I·O bytes and for each output a float32 scale
and, in int8, a zero point of 1 byte (torchao's formats).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixart_rt.bundle import ComponentEntry
from pixart_rt.checkpoints.bundle_module import build_module
from pixart_rt.config import ModelConfig, Precision, Quality, Weights
from pixart_rt.model.quantize import in_a_layer
from pixart_rt.model.text_encoder import keep_dtype
from pixart_rt.model.text_kv import TextSide

SIZE = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}  # bytes
DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}


def module_bytes(
    component: str,
    config: dict[str, Any],
    precision: Precision,
    weights: Weights = Weights.FULL,
    quality: Quality = Quality.HIGH,
) -> int:
    """Bytes of a component in PyTorch; `text_side` is one more. Nothing is allocated.

    Quality fast keeps an fp8 copy of the transformer's linears beside the originals.
    """
    module, text = _module(component, json.dumps(config)), component == "text_encoder"
    total = 0
    for name, parameter in module.named_parameters():
        dtype = keep_dtype(name, DTYPES[precision]) if text else DTYPES[precision]
        size, count = parameter.numel() * dtype.itemsize, parameter.numel()
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and in_a_layer(module.get_submodule(layer), layer):
            if weights is not Weights.FULL:
                size = count + len(parameter) * (4 if weights is Weights.FP8 else 5)
            elif quality is Quality.FAST and component == "transformer":
                size += count + len(parameter) * 4
        total += size
    return total


@lru_cache(maxsize=8)
def _module(component: str, config: str) -> nn.Module:
    values = json.loads(config)
    with torch.device("meta"):
        if component == "text_side":
            return TextSide(ModelConfig.from_dict(values))
        return build_module(component, values)


def engine_bytes(folder: Path, entry: ComponentEntry) -> int:
    """Bytes of a component's engine files, their external weights included."""
    variants = () if entry.plugins is None else entry.plugins.parts  # run in place of the others
    return sum((folder / name).stat().st_size for name in entry.files if name not in variants)
