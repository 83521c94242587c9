"""Noise that depends on (seed, step, sample) alone, text padding, bfloat16 as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pixart_rt.data.checksum import checksum
from pixart_rt.data.sample import bfloat16_from_bytes, bfloat16_to_bytes, draw_noise, pad_text
from pixart_rt.errors import ConfigError

SHAPE = (4, 5, 7)


def test_noise_does_not_depend_on_the_batch():
    together = draw_noise(3, 11, [8, 2, 40], SHAPE)
    for row, sample in enumerate([8, 2, 40]):
        torch.testing.assert_close(
            together[row], draw_noise(3, 11, [sample], SHAPE)[0], rtol=0, atol=0
        )


def test_every_seed_step_and_sample_has_noise_of_its_own():
    drawn = {
        (seed, step, sample): draw_noise(seed, step, [sample], SHAPE).numpy().tobytes()
        for seed in (0, 1) for step in (0, 1, 2) for sample in (0, 1, 2)
    }  # fmt: skip
    assert len(set(drawn.values())) == len(drawn)


def test_noise_is_standard_normal():
    noise = draw_noise(0, 0, range(200), (4, 32, 32)).double()
    count = noise.numel()  # 819200: the bounds are five standard errors
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    neighbours = (noise[:-1] * noise[1:]).mean()
    assert abs(neighbours) < 5 / count**0.5


def test_negative_seeds_are_refused():
    with pytest.raises(ConfigError, match="must not be negative"):
        draw_noise(-1, 0, [0], SHAPE)


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
