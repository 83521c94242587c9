"""Checks that a run makes before its first step, so that days of training do not end on a typo.

Raises ConfigError and CheckpointError that name the argument of `train` (run.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pixart_rt.checkpoints.hub import locate_whole
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline
from pixart_rt.errors import ConfigError
from pixart_rt.files import PIPELINE, TRANSFORMER, check_file, check_folder, check_into
from pixart_rt.training.phases import DONE, phase_folder, result_path
from pixart_rt.training.prediction_target import check_target
from pixart_rt.training.recipe import Phase, Recipe, Weights


def chosen_phases(recipe: Recipe, names: Collection[str]) -> list[Phase]:
    """The named phases in the recipe's order; all of them without names."""
    known = [phase.name for phase in recipe.phases]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"`phases={name}` was requested, which is not in the recipe; it has "
                f"{', '.join(known)}"
            )
    return [phase for phase in recipe.phases if not names or phase.name in names]


def data_paths(
    recipe: Recipe, phases: Sequence[Phase], given: Mapping[str, str | Path]
) -> dict[str, Path]:
    """The path of each phase's data by the phase's name."""
    known = {phase.name for phase in recipe.phases} | {phase.data for phase in recipe.phases}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"`data['{name}']` names no data of the recipe; there are "
                f"{', '.join(sorted({phase.data for phase in recipe.phases}))}, and the phases"
            )
    paths = {}
    for phase in phases:
        path = given.get(phase.name, given.get(phase.data))
        if path is None:
            raise ConfigError(
                f"phase {phase.name} trains on {phase.data}; say where it is with "
                f"`data['{phase.data}']`"
            )
        paths[phase.name] = Path(str(path).replace("{res}", str(phase.resolution)))
    return paths


def check_places(
    out: Path,
    data: Mapping[str, Path],
    *,
    pipeline: str | None,
    encoder: str | None,
    validation: str | None,
) -> None:
    """Check what is read and written at the ends of a run; `validation` is its images' model.

    The run's folder may hold anything: its phases look after their own (trainer.py).
    """
    check_into(out)
    for phase, path in data.items():
        if not path.is_dir():
            raise ConfigError(
                f"{path}, the data of phase {phase}, is no feature store and no folder of "
                "pictures; check `data`"
            )
    if pipeline is not None:
        check_folder(out / "pipeline", PIPELINE, force=True)  # of this run, or not ours
        folder = locate_whole("`pipeline`", pipeline, COMPONENTS[1:])
        if not is_pipeline(folder):
            raise ConfigError(f"`pipeline` {pipeline} was requested, which has no model_index.json")
        check_target("`pipeline`", pipeline, folder)
    if encoder is not None:
        locate_whole("`encoder`", encoder, ("vae", "text_encoder", "tokenizer"))
    if validation is not None:
        folder = locate_whole("`validate_with`", validation, COMPONENTS[1:])
        check_target("`validate_with`", validation, folder)


def check_results(recipe: Recipe, phases: Sequence[Phase], out: Path) -> None:
    """Refuse phases whose weights could not be written at their end."""
    for phase in phases:
        folder = phase_folder(recipe, phase, out)
        if (folder / DONE).is_file():
            continue
        for weights in Weights:
            path = result_path(phase, folder, weights)
            if phase.of_classes:
                check_file(path, force=True)
            else:
                check_folder(path, TRANSFORMER, force=True)
