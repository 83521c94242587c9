"""Text padding, and bfloat16 as bytes. T text tokens (the model's maximum), E text width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pad_text(features: Sequence[Tensor], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Unpadded features, each [n, E] bfloat16, to [B, T, E] and their mask [B, T] bool."""
    embeds = torch.zeros(len(features), max_tokens, features[0].shape[1], dtype=torch.bfloat16)
    mask = torch.zeros(len(features), max_tokens, dtype=torch.bool)
    for row, feature in enumerate(features):
        embeds[row, : len(feature)] = feature
        mask[row, : len(feature)] = True
    return embeds, mask


def bfloat16_to_bytes(values: Tensor) -> bytes:
    """A bfloat16 tensor as its bit patterns: little-endian 16-bit words, row by row."""
    bits = values.contiguous().view(torch.int16).numpy()
    return bits.astype("<i2", copy=False).tobytes()


def bfloat16_from_bytes(data: bytes | memoryview, width: int) -> Tensor:
    """The [rows, width] bfloat16 tensor of bit patterns that bfloat16_to_bytes wrote."""
    bits = np.frombuffer(data, "<i2").reshape(-1, width).astype(np.int16)  # a copy: writable
    return torch.from_numpy(bits).view(torch.bfloat16)
