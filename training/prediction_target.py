"""The models that training here can start from: those that predict noise on PixArt's betas."""

from __future__ import annotations

from pathlib import Path

from pixart_rt.checkpoints.pipeline_folder import is_pipeline
from pixart_rt.checkpoints.scheduler_config import TRAINING, SchedulerSettings
from pixart_rt.errors import ConfigError


def check_target(argument: str, model: str, path: Path) -> None:
    """Raise ConfigError that names `argument` where the scheduler of `model` says another target.

    path: a pipeline folder, or the transformer in one. Other files and folders say nothing of how
    they were trained. Raises CheckpointError for a damaged configuration.
    """
    pipeline = path if is_pipeline(path) else path.parent
    if not is_pipeline(pipeline):
        return
    settings = SchedulerSettings.read(pipeline / "scheduler")
    other = {key: settings[key] for key, usual in TRAINING.items() if settings[key] != usual}
    if other:
        said = ", ".join(f"{key} {str(value)[:40]}" for key, value in other.items())
        raise ConfigError(
            f"{argument} {model} was trained with {said} ({settings.source}); training here "
            "predicts noise on linear betas, which would ruin it: use a model that was trained so"
        )
