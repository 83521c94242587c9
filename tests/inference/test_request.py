"""A request: what it accepts, what it refuses in words, and its defaults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pixart_rt.approximations import StepCache
from pixart_rt.bundle import Manifest
from pixart_rt.config import EngineConfig, ModelConfig, Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.inference.call_arguments import call_requests
from pixart_rt.inference.request import LARGEST_DRAWN_SEED, LONGEST_TEXT, Request


@pytest.fixture
def manifest() -> Callable[..., Manifest]:
    def make(scheduler: str = "dpm-solver++", **model: Any) -> Manifest:
        return Manifest(
            pixart_rt_version="0", key="k" * 64, created="2026-01-01T00:00:00+00:00",
            model={"name": "made up", "sha256": "0"}, model_config=ModelConfig(**model).to_dict(),
            engine_config={"resolution": EngineConfig().resolution, "max_batch": 1}, components={},
            files={}, vae={}, scheduler=scheduler, buckets=[[512, 2048]], versions={}, build={},
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 7}, r"prompt must be text, got 7 \(int\)"),
        ({"prompt": None}, "give prompt, or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 2, 3)}, "one of the two"),
        ({"prompt": "x" * (LONGEST_TEXT + 1)}, f"has {LONGEST_TEXT + 1} characters"),
        ({"prompt": "caf\udce9"}, "not valid UTF-8"),
        ({"negative_prompt": 3.5}, "negative_prompt must be text"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 2, 3)}, "one of the"),
        ({"seed": 2.5}, "seed must be a whole number, got 2.5"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, f"seed must be at most {2**64 - 1}"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"generator": torch.Generator(), "seed": 4}, "seed 4 and a generator"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": "4.5"}, "guidance_scale must be a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two fractions"),
        ({"guidance_interval": (0, "1")}, "guidance_interval must be a number"),
        ({"scheduler": "euler"}, "scheduler 'euler' is unknown; choose from dpm-solver"),
        ({"scheduler": 3}, "scheduler 3 is unknown"),
        ({"approximate": 0.1}, "approximate must be a StepCache"),
        ({"aspect_ratio": 1.5}, r"aspect_ratio must be text, got 1.5 \(float\)"),
        ({"height": 64}, "height and width go together"),
        ({"height": 64, "width": 64, "aspect_ratio": "1:1"}, "not both"),
        ({"height": 0, "width": 64}, "height must be at least 1"),
        ({"height": 64, "width": 10**9}, "width must be at most"),
        ({"control_image": "edges.png"}, "control_image must be a PIL image"),
        ({"control_latents": [1]}, "control_latents must be a tensor"),
    ],
)
def test_what_no_image_has_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**{"prompt": "a star", **arguments})


def test_numpy_s_numbers_are_numbers() -> None:
    request = Request(
        prompt="a star", seed=np.int64(3), num_inference_steps=np.int32(4),
        guidance_scale=np.float32(2.5), height=np.uint16(64), width=np.int8(32),
    )  # fmt: skip
    values = [request.seed, request.num_inference_steps, request.height, request.width]
    assert values == [3, 4, 64, 32] and all(type(value) is int for value in values)
    assert request.guidance_scale == 2.5 and type(request.guidance_scale) is float


def test_a_seed_of_none_is_drawn_once() -> None:
    requests = [Request(prompt="a star", seed=None) for _ in range(8)]
    seeds = {request.seed for request in requests}
    assert len(seeds) == 8, "2**32 seeds to choose from"
    assert all(seed is not None and 0 <= seed <= LARGEST_DRAWN_SEED for seed in seeds)
    assert requests[0].filled(num_inference_steps=3).seed == requests[0].seed


def test_a_generator_s_seed_is_its_initial_one() -> None:
    generator = torch.Generator().manual_seed(2**63 + 5)
    request = Request(prompt="a star", generator=generator)
    assert request.seed == 2**63 + 5
    assert request.filled(scheduler="ddim").generator is generator


@pytest.mark.parametrize(
    ("arguments", "default", "expected"),
    [
        ({}, "dpm-solver++", (Scheduler.DPM_SOLVER, 20, 4.5)),
        ({}, "lcm", (Scheduler.LCM, 4, 1.0)),
        ({"scheduler": "dmd", "force_scheduler": True}, "dpm-solver++", (Scheduler.DMD, 1, 1.0)),
        ({"scheduler": "ddim", "force_scheduler": True}, "lcm", (Scheduler.DDIM, 20, 4.5)),
        ({"num_inference_steps": 8, "guidance_scale": 1}, "lcm", (Scheduler.LCM, 8, 1.0)),
        ({"guidance_scale": 0}, "dpm-solver++", (Scheduler.DPM_SOLVER, 20, 0.0)),
    ],
)
def test_the_checkpoint_has_the_defaults(
    manifest: Callable[..., Manifest], arguments: dict[str, Any], default: str, expected: Any
) -> None:
    sampling = Request(prompt="a star", **arguments).resolved(manifest(default)).sampling
    assert (sampling.scheduler, sampling.num_inference_steps, sampling.guidance_scale) == expected
    assert sampling.guidance_interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "lcm", "guidance_scale": 4.5}, "distilled into the model"),
        ({"num_inference_steps": 0}, "between 1 and 999"),
        ({"scheduler": "dmd", "num_inference_steps": 2}, "must be 1 with dmd"),
        ({"scheduler": "iddpm"}, "learned variance; use ddim"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"aspect_ratio": "1e10000000:1"}, "width:height"),
        ({"aspect_ratio": "1:1e400"}, "width:height"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused(
    manifest: Callable[..., Manifest], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(prompt="a star", **arguments).resolved(manifest(out_channels=4))


def test_a_call_s_settings_are_for_requests_that_leave_theirs_out() -> None:
    mine = Request(prompt="a star", num_inference_steps=3)
    filled = mine.filled(num_inference_steps=9, approximate=StepCache(0.1), scheduler=None)
    assert (filled.num_inference_steps, filled.approximate) == (3, StepCache(0.1))


def requests(**arguments: Any) -> list[Request]:
    usual: dict[str, Any] = {
        "prompt": "a star", "negative_prompt": None, "num_images_per_prompt": 1, "seed": 0,
        "generator": None, "control_image": None, "control_latents": None,
        "embeds": dict.fromkeys(("prompt_embeds", "negative_prompt_embeds")),
    }  # fmt: skip
    return call_requests(**{**usual, **arguments})


def test_a_call_is_a_request_for_each_image() -> None:
    made = requests(prompt=["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2, seed=5)
    values = [(each.prompt, each.negative_prompt, each.seed) for each in made]
    assert values == [("a", "c", 5), ("a", "c", 6), ("b", "d", 7), ("b", "d", 8)]
    assert [each.seed for each in requests(prompt=["a", "b"], seed=(9, 4))] == [9, 4]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    made = requests(prompt=["a", "b"], generator=generators)
    assert [each.generator for each in made] == generators and [r.seed for r in made] == [3, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b"], "generator": torch.Generator(), "seed": [4, 5]}, "seed 4 and a"),
        ({"prompt": [None]}, "prompt must be text, got None"),
        ({"prompt": 7}, "prompt must be text, got 7"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt must be at most 10000"),
        ({"prompt": ["a"] * 101, "num_images_per_prompt": 100}, "10100 images were requested"),
        ({"prompt": ["a", "b"], "generator": [torch.Generator()]}, "1 generators were given for 2"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
    ],
)
def test_lists_that_make_no_images_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        requests(**arguments)


def test_a_request_needs_no_torch() -> None:
    code = "from pixart_rt.inference.request import Request; Request(prompt='a'); import sys; "
    code += "print(bool({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
