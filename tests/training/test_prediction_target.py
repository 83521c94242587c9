"""Training starts from models that predict noise on PixArt's betas, and refuses others at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixart_rt.checkpoints.hub import TINY
from pixart_rt.errors import ConfigError
from pixart_rt.training.finetune.job import Job, open_base
from pixart_rt.training.finetune.settings import JobOptions, LoraSettings
from pixart_rt.training.prediction_target import check_target


def pipeline(folder: Path, **settings: Any) -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    values = {"_class_name": "DPMSolverMultistepScheduler", **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return folder


OTHERS = [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"rescale_betas_zero_snr": True},
    {"beta_schedule": "scaled_linear"},
    {"beta_end": 0.012},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
]


@pytest.mark.parametrize("settings", OTHERS, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("inside", ["", "transformer"])
def test_a_model_of_another_target_is_refused(settings, inside, tmp_path):
    path = pipeline(tmp_path / "P", **settings) / inside
    with pytest.raises(ConfigError, match=r"`model` mine was trained with .* predicts noise"):
        check_target("`model`", "mine", path)


def test_a_model_that_predicts_noise_or_says_nothing_is_taken(tmp_path):
    check_target("`model`", "tiny", TINY)
    check_target("`model`", "mine", pipeline(tmp_path / "P"))
    check_target("`model`", "mine", tmp_path / "model.pth")


def test_fine_tuning_asks_before_it_reads_the_weights(tmp_path):
    model = pipeline(tmp_path / "V", prediction_type="v_prediction")
    job = Job(model=str(model), out=tmp_path / "out", settings=LoraSettings(), options=JobOptions())
    with pytest.raises(ConfigError, match="prediction_type v_prediction"):
        open_base(job, [], [])
    assert not (tmp_path / "out").exists()
