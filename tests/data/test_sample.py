"""Text padding, bfloat16 as bytes, checksums."""

from __future__ import annotations

import numpy as np
import torch

from pixart_rt.data.sample import bfloat16_from_bytes, bfloat16_to_bytes, pad_text
from pixart_rt.data.shard_checksum import checksum


def test_text_is_padded_and_masked():
    features = [torch.ones(n, 6, dtype=torch.bfloat16) * n for n in (1, 3, 5)]
    embeds, mask = pad_text(features, 5)
    assert embeds.shape == (3, 5, 6)
    assert embeds.dtype == torch.bfloat16
    assert mask.sum(1).tolist() == [1, 3, 5]
    assert (embeds[~mask] == 0).all()
    assert embeds[1, :3].unique().tolist() == [3]


def test_bfloat16_keeps_every_bit_pattern():
    bits = np.arange(2**16, dtype=np.uint16).astype(np.int16)
    values = torch.from_numpy(bits).view(torch.bfloat16).reshape(-1, 8)
    data = bfloat16_to_bytes(values)
    assert data[:6] == b"\x00\x00\x01\x00\x02\x00", "little-endian, row by row"
    back = bfloat16_from_bytes(data, 8)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), values.view(torch.int16))
    back[0, 0] = 1  # and it may be written to


def test_the_checksum_sees_every_part():
    whole = (7, 3, (300, 200), (0.5, 0.0, 299.0, 200.0), b"latents", b"text")
    others = [
        (8, *whole[1:]), (7, 4, *whole[2:]), (7, 3, (301, 200), *whole[3:]),
        (7, 3, (300, 200), (0.25, 0.0, 299.0, 200.0), b"latents", b"text"),
        (*whole[:4], b"latentt", b"text"), (*whole[:5], b"tex"),
    ]  # fmt: skip
    assert len({checksum(*each) for each in (whole, *others)}) == 7
