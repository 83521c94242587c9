"""Settings refuse what cannot be, in words; what they hold survives JSON. Oracle: the paper."""

import json
import math

import pytest

from pixart_rt.config import (
    PUBLISHED,
    RANDOM_XL,
    CfgNull,
    EngineConfig,
    ModelConfig,
    Precision,
    SamplingConfig,
    Scheduler,
)
from pixart_rt.errors import ConfigError, PixArtError


def test_the_default_model_is_xl_2_at_1024():
    config = ModelConfig()
    assert (config.hidden_size, config.num_layers, config.token_channels) == (1152, 28, 16)
    assert (config.resolution, config.base_size) == (1024, 64)
    assert config.learned_variance
    assert config.cfg_null is CfgNull.EMPTY_PROMPT  # diffusers' convention


@pytest.mark.parametrize("resolution", sorted(RANDOM_XL))
def test_presets_are_of_their_resolution(resolution):
    config = RANDOM_XL[resolution]
    assert config.resolution == resolution
    assert config.interpolation_scale == max(resolution // 512, 1)  # diffusers' rule
    assert config.micro_conditioning == (resolution == 1024)
    assert str(resolution) in PUBLISHED[resolution]


@pytest.mark.parametrize("null", list(CfgNull))
def test_a_model_config_survives_json(null):
    config = ModelConfig(num_layers=3, interpolation_scale=0.5, cfg_null=null)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_heads": -1}, "num_heads must be positive"),
        ({"max_text_tokens": 0}, "max_text_tokens must be positive"),
        ({"out_channels": 6}, "out_channels is 6; it must be in_channels"),
        ({"num_heads": 1, "head_dim": 6, "micro_conditioning": False}, "a multiple of 4"),
        ({"num_heads": 1, "head_dim": 64}, "splits the width in three"),
        ({"interpolation_scale": 0}, "interpolation_scale must be > 0"),
        ({"interpolation_scale": math.nan}, "interpolation_scale must be > 0"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig(**changes)
    assert isinstance(caught.value, PixArtError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_unknown_model_settings_are_refused():
    with pytest.raises(ConfigError, match=r"unknown model settings \['depth'\]"):
        ModelConfig.from_dict({"depth": 28})


def test_engine_config_knows_its_tokens():
    assert EngineConfig(resolution=512).token_range == (924, 1024)
    assert EngineConfig(precision=Precision("bf16")).precision is Precision.BF16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 768}, "resolution 768 is not one of"),
        ({"max_batch": 0}, "max_batch must be between 1 and 31"),
        ({"components": ("vae",)}, r"components \['vae'\] are unknown"),
        ({"components": ()}, "components"),
    ],
)
def test_impossible_engines_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes)


def test_sampling_defaults_are_diffusers():
    config = SamplingConfig()
    assert (config.num_inference_steps, config.guidance_scale) == (20, 4.5)
    assert config.scheduler is Scheduler.DPM_SOLVER


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (1.01, True)])
def test_guidance_runs_above_one(scale, guided):
    assert SamplingConfig(guidance_scale=scale).guided is guided


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "between 1 and"),
        ({"num_inference_steps": 1001}, "between 1 and"),
        ({"num_inference_steps": 2, "scheduler": Scheduler.DMD}, "must be 1 with dmd, got 2"),
        ({"guidance_scale": -0.1}, "guidance_scale must be from 0 to 100, got"),
        ({"guidance_scale": 1000}, "guidance_scale must be from 0 to 100, got 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale must be from 0 to 100, got"),
    ],
)
def test_impossible_sampling_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**changes)
