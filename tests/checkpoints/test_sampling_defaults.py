"""A checkpoint's own sampler, guidance and steps: where they are stated, and what wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.bundle import MANIFEST, Manifest
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.sampling_defaults import read_sampling
from pixart_rt.config import ModelConfig, SamplingDefaults, Scheduler
from pixart_rt.errors import BundleError, CheckpointError, ConfigError
from pixart_rt.inference.request import Request
from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler

STATED = {"_pixart_rt_guidance_scale": 2.5, "_pixart_rt_num_inference_steps": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A pipeline folder's two files of settings."""

    def write(scheduler: str = "DPMSolverMultistepScheduler", **index: Any) -> Path:
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": scheduler}))
        named = {"_class_name": "PixArtAlphaPipeline", "scheduler": ["diffusers", scheduler]}
        (tmp_path / "model_index.json").write_text(json.dumps({**named, **index}))
        return tmp_path

    return write


def test_the_index_states_them(folder: Callable[..., Path]) -> None:
    usual = SamplingDefaults()
    assert read_sampling(folder(), "mine", None) == (Scheduler.DPM_SOLVER, usual)
    assert read_sampling(None, "a.pth", None) == (Scheduler.DPM_SOLVER, usual)
    stated = SamplingDefaults(guidance_scale=2.5, num_inference_steps=12)
    assert read_sampling(folder(**STATED), "mine", None) == (Scheduler.DPM_SOLVER, stated)
    assert read_sampling(TINY, "tiny", None)[1] == SamplingDefaults(guidance_scale=3)


def test_what_tells_distilled_weights(folder: Callable[..., Path]) -> None:
    """Their guidance is the teacher's, so it is not taken; their steps are."""
    own = SamplingDefaults(num_inference_steps=12)
    assert read_sampling(folder("LCMScheduler", **STATED), "mine", None) == (Scheduler.LCM, own)
    made = read_sampling(folder(**STATED), "mine", {"scheduler": "lcm"})
    assert made == (Scheduler.LCM, own), "weights of our training, put into a folder by hand"
    marked = read_sampling(folder(_pixart_rt_scheduler="dmd"), "mine", None)
    assert marked == (Scheduler.DMD, SamplingDefaults())
    published = "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512"
    assert read_sampling(folder(), published, None)[0] is Scheduler.DMD


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_pixart_rt_guidance_scale": "3"}, "guidance_scale must be a number, got '3'"),
        ({"_pixart_rt_guidance_scale": -1}, "from 0 to 100"),
        ({"_pixart_rt_num_inference_steps": 2.5}, "num_inference_steps must be a number"),
        ({"_pixart_rt_num_inference_steps": 2000}, "between 1 and 999"),
        ({"_pixart_rt_scheduler": "euler"}, "'euler' is not a valid Scheduler"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Callable[..., Path], index: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_sampling(folder(**index), "mine", None)


def test_a_student_keeps_nothing_of_its_teacher_s(folder: Callable[..., Path]) -> None:
    path = folder(**STATED)
    use_lcm_scheduler(path)
    assert read_sampling(path, "mine", None) == (Scheduler.LCM, SamplingDefaults())


def manifest(scheduler: str, **sampling: Any) -> Manifest:
    return Manifest(
        pixart_rt_version="0", key="k" * 64, created="2026-01-01T00:00:00+00:00",
        model={"name": "mine", "sha256": "0"}, model_config=ModelConfig().to_dict(),
        engine_config={"resolution": 1024, "max_batch": 1}, components={}, files={}, vae={},
        scheduler=scheduler, buckets=[], versions={}, build={}, sampling=sampling,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "own", "stated", "expected"),
    [
        ({}, "dpm-solver++", {}, (20, 4.5)),
        ({}, "dpm-solver++", {"guidance_scale": 0}, (20, 0)),
        ({}, "dpm-solver++", {"guidance_scale": 3.0, "num_inference_steps": 14}, (14, 3.0)),
        ({"scheduler": "ddim"}, "dpm-solver++", {"guidance_scale": 3.0}, (20, 3.0)),
        ({"guidance_scale": 2, "num_inference_steps": 5}, "dpm-solver++",
         {"guidance_scale": 3.0, "num_inference_steps": 14}, (5, 2)),
        ({}, "lcm", {"num_inference_steps": 8}, (8, 1)),
        ({}, "dmd", {}, (1, 1)),
        ({"scheduler": "lcm", "force_scheduler": True}, "dpm-solver++",
         {"guidance_scale": 3.0, "num_inference_steps": 14}, (4, 1)),
    ],
)  # fmt: skip
def test_the_caller_wins_then_the_bundle_then_the_usual(
    asked: dict[str, Any], own: str, stated: dict[str, Any], expected: tuple[int, float]
) -> None:
    sampling = Request(prompt="a star", **asked).resolved(manifest(own, **stated)).sampling
    assert (sampling.num_inference_steps, sampling.guidance_scale) == expected


@pytest.mark.parametrize(
    ("asked", "own"),
    [("lcm", "dpm-solver++"), ("dmd", "dpm-solver++"), ("ddim", "lcm"), ("dpm-solver++", "dmd"),
     ("lcm", "dmd"), ("dmd", "lcm")],
)  # fmt: skip
def test_a_sampler_of_other_weights_needs_force(asked: str, own: str) -> None:
    with pytest.raises(ConfigError) as error:
        Request(prompt="a star", scheduler=asked).resolved(manifest(own))
    assert f"scheduler {asked} was requested of mine, whose" in str(error.value)
    assert f"trained for {own}" in str(error.value) and "force_scheduler" in str(error.value)
    Request(prompt="a star", scheduler=asked, force_scheduler=True).resolved(manifest(own))
    assert Request(prompt="a star", scheduler=own).resolved(manifest(own)).sampling


def test_a_bundle_keeps_them_and_older_ones_have_none(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    path.write_text(manifest("dpm-solver++", guidance_scale=3.0).to_json())
    assert Manifest.read(tmp_path).sampling_defaults == SamplingDefaults(guidance_scale=3)
    values = json.loads(path.read_text())
    del values["sampling"]
    path.write_text(json.dumps(values))
    assert Manifest.read(tmp_path).sampling_defaults == SamplingDefaults()
    for wrong in ({"guidance_scale": "3"}, {"guidance": 3}, 3):
        path.write_text(json.dumps({**values, "sampling": wrong}))
        with pytest.raises(BundleError, match="is damaged"):
            Manifest.read(tmp_path)
