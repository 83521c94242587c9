"""Patches, position tables and sinusoids against diffusers' own layers."""

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, Timesteps, get_2d_sincos_pos_embed

from pixart_rt.buckets import RESOLUTIONS, buckets
from pixart_rt.config import ModelConfig
from pixart_rt.errors import ConfigError
from pixart_rt.model.embeddings import patchify, position_table, sinusoid, unpatchify

SCALES = {256: 1.0, 512: 1.0, 1024: 2.0}


def _config(resolution: int, num_heads: int = 1, scale: float | None = None) -> ModelConfig:
    return ModelConfig(
        num_heads=num_heads,
        sample_size=resolution // 8,
        interpolation_scale=scale or SCALES[resolution],
        micro_conditioning=False,
    )


def _diffusers_table(config: ModelConfig, grid: tuple[int, int]) -> torch.Tensor:
    return get_2d_sincos_pos_embed(
        config.hidden_size,
        grid,
        base_size=config.base_size,
        interpolation_scale=config.interpolation_scale,
        output_type="pt",
    )[None].float()


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_position_tables_of_all_buckets_are_bit_equal_to_diffusers(resolution):
    config = _config(resolution)
    for bucket in buckets(resolution):
        actual = position_table(config, bucket.grid)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, _diffusers_table(config, bucket.grid)), bucket


def test_position_tables_are_what_patch_embed_adds():
    config = _config(256)
    layer = PatchEmbed(
        height=32, width=32, patch_size=2, in_channels=4, embed_dim=config.hidden_size,
        interpolation_scale=1,
    )  # fmt: skip
    torch.nn.init.zeros_(layer.proj.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    for bucket in buckets(256):
        added = layer(torch.zeros(1, 4, bucket.height // 8, bucket.width // 8))
        assert torch.equal(position_table(config, bucket.grid), added), bucket


@pytest.mark.parametrize(
    ("resolution", "scale"), [(256, 0.5), (512, 1.0), (1024, 2.0)], ids=["0.5", "1", "2"]
)
def test_position_table_at_full_width_and_sigma_scales(resolution, scale):
    config = _config(resolution, num_heads=16, scale=scale)  # 1152, and Sigma's half step
    grid = (9, 28)
    assert torch.equal(position_table(config, grid), _diffusers_table(config, grid))


def test_positions_span_the_same_range_whatever_the_aspect():
    """A check by the formula: column c of w sits at c / (w / base) / scale."""
    config = _config(1024)
    table = position_table(config, (32, 128)).reshape(32, 128, -1)
    half = config.hidden_size // 2
    expected = torch.sin(torch.tensor(5 / (128 / 64) / 2.0))
    torch.testing.assert_close(table[0, 5, 0], expected)  # the column, in the first half
    torch.testing.assert_close(table[5, 0, half], torch.sin(torch.tensor(5 / (32 / 64) / 2.0)))


@pytest.mark.parametrize(("h", "w"), [(2, 2), (18, 56), (64, 14)])
def test_patchify_feeds_a_linear_what_a_convolution_sees(h, w):
    torch.manual_seed(0)
    latents = torch.randn(2, 4, h, w, dtype=torch.float64)
    conv = torch.nn.Conv2d(4, 24, kernel_size=2, stride=2, dtype=torch.float64)
    expected = conv(latents).flatten(2).transpose(1, 2)
    actual = patchify(latents, 2) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (9, 28), (28, 9)])
def test_unpatchify_is_diffusers_einsum(grid):
    rows, columns = grid
    tokens = torch.randn(2, rows * columns, 2 * 2 * 8)
    patches = tokens.reshape(2, rows, columns, 2, 2, 8)
    expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 8, rows * 2, columns * 2)
    assert torch.equal(unpatchify(tokens, grid, 2), expected)


def test_unpatchify_undoes_patchify():
    latents = torch.randn(3, 4, 18, 56)
    tokens = patchify(latents, 2)  # channel first in each patch; the model's output is channel last
    channel_last = tokens.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(2)
    assert torch.equal(unpatchify(channel_last, (9, 28), 2), latents)


def test_patchify_refuses_odd_latents():
    with pytest.raises(ConfigError, match="latents of 33x32 do not divide"):
        patchify(torch.zeros(1, 4, 33, 32), 2)


def test_sinusoid_matches_diffusers_timesteps():
    layer = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
    values = torch.tensor([0.0, 0.25, 0.6842105, 1.0, 499.0, 500.0, 999.0, 2048.0])
    # float32 angles near 2048 are 1.2e-4 apart; the same operations give the same angles.
    torch.testing.assert_close(sinusoid(values), layer(values), atol=1e-6, rtol=0)


def test_sinusoid_keeps_timesteps_apart_in_half_models():
    """bfloat16 rounds both 999 and 1000 to 1000; an integer timestep must not pass through it."""
    apart = sinusoid(torch.tensor([999])) - sinusoid(torch.tensor([1000]))
    assert sinusoid(torch.tensor([999])).dtype == torch.float32
    assert apart.abs().max() > 0.1
