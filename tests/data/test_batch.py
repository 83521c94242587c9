"""Numbers that depend on (seed, step, sample) alone; batches cut, moved and pinned as a whole."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.buckets import buckets
from pixart_rt.data.batch import Batch, Stream, draw_noise, draw_uniform
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


def test_streams_are_apart():
    latents, noise = (draw_noise(0, 5, [2], SHAPE, each) for each in Stream)
    assert not torch.isin(latents, noise).any()


def test_uniform_numbers_depend_on_the_sample_alone_and_fill_the_interval():
    together = draw_uniform(3, 11, [8, 2, 40], 4)
    assert torch.equal(together[1], draw_uniform(3, 11, [2], 4)[0])
    assert together.dtype == torch.float64
    drawn = draw_uniform(0, 0, range(5000), 4).flatten()
    assert len(drawn.unique()) == len(drawn)
    counts = torch.histc(drawn, 10, 0, 1)  # of 2000 each; five standard deviations are 212
    assert (counts - 2000).abs().max() < 212
    assert drawn.min() >= 0 and drawn.max() < 1


def test_rows_of_a_batch_are_its_samples():
    batch = Batch(
        ids=torch.arange(5),
        latents=torch.randn(5, 4, 2, 2),
        prompt_embeds=torch.randn(5, 3, 6).bfloat16(),
        prompt_mask=torch.rand(5, 3) < 0.5,
        original_size=torch.rand(5, 2),
        aspect_ratio=torch.rand(5, 1),
        bucket=buckets(256)[7],
    )
    part = batch.rows(1, 4)
    assert len(batch) == 5 and len(part) == 3 and part.labels is None
    assert part.ids.tolist() == [1, 2, 3] and part.bucket == batch.bucket
    assert torch.equal(part.latents, batch.latents[1:4])
    moved = part.to("meta")
    assert moved.latents.is_meta and moved.prompt_mask.dtype == torch.bool
