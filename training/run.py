"""Train a recipe: its phases in order, on one process or, under torchrun, on many.

    train("recipes/own-images.toml", {"own": "features"}, "run", init="tiny", pipeline="tiny")

What a phase does is in phases.py. Notes and log lines go to the loggers of this package.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_rt.checkpoints.hub import locate, transformer_path
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, write_model
from pixart_rt.checkpoints.tensor_names import expected_shapes
from pixart_rt.checkpoints.transformer import TransformerCheckpoint, read_transformer
from pixart_rt.config import Precision
from pixart_rt.data.loader import Source
from pixart_rt.data.training_data import open_data
from pixart_rt.errors import ConfigError
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.training.device_defaults import usual_kernels, usual_precision
from pixart_rt.training.phases import (
    Validate,
    global_batch,
    is_done,
    phase_folder,
    phase_trainer,
    result_path,
    run_phase,
    run_settings,
)
from pixart_rt.training.prediction_target import check_target
from pixart_rt.training.presets import Preset
from pixart_rt.training.process_group import Ranks, start_ranks
from pixart_rt.training.recipe import Phase, Recipe, Weights, read_recipe
from pixart_rt.training.recipe_report import report
from pixart_rt.training.replay import replay
from pixart_rt.training.run_checks import check_places, check_results, chosen_phases, data_paths
from pixart_rt.training.run_options import DEFAULT_OPTIONS, TrainOptions
from pixart_rt.training.validation import Validation, ValidationSettings

_log = logging.getLogger(__name__)


def train(
    recipe: Recipe | str | Path,
    data: Mapping[str, str | Path],
    out: str | Path,
    *,
    preset: Preset | None = None,
    phases: Collection[str] = (),
    init: str | None = None,
    pipeline: str | None = None,
    encoder: str | None = None,
    options: TrainOptions = DEFAULT_OPTIONS,
) -> Path:
    """Train a recipe's phases, each from wherever it stopped; return where the result is.

    recipe: settings or a TOML file. preset: replaces the recipe's.
    data: paths by the recipe's names for data, or by phase: feature stores, or folders of pictures,
      which the model `encoder` encodes; {res} stands for the phase's resolution.
    out: the run's folder; phases that are done there are not run again.
    phases: names of those to run, by default all.
    init: what the first phase that is run starts from, instead of the recipe's: a checkpoint,
      "tiny", a pipeline folder or a hub id.
    pipeline: a model of which `out`/pipeline becomes a copy with the last phase's average.

    The result is `out`/pipeline, or the last phase's averages. Raises ConfigError, DataError and
    CheckpointError, one line each; what can be checked is checked before the first step.
    """
    run = _checked(recipe, data, out, preset, phases, init, encoder, options, pipeline)
    with _started(run) as live:
        if live.ranks.is_first:
            overrides = options.overrides
            lines = report(
                run.recipe,
                _num_parameters(run.recipe),
                batch=overrides.batch,
                optimizer=overrides.optimizer,
            )
            for line in lines:
                _log.info("%s", line)
        done = _run_phases(live)
        if pipeline is None:
            return done
        if live.ranks.is_first:
            _write_pipeline(done, pipeline, run.out / "pipeline")
        live.ranks.barrier()
        return run.out / "pipeline"


def replay_step(
    recipe: Recipe | str | Path,
    data: Mapping[str, str | Path],
    out: str | Path,
    phase: str,
    step: int,
    *,
    preset: Preset | None = None,
    init: str | None = None,
    encoder: str | None = None,
    options: TrainOptions = DEFAULT_OPTIONS,
) -> dict[str, Any]:
    """Run one step of a phase again, without writing anything; report what was not finite in it.

    The arguments are those that `train` was called with. The report is replay.py's.
    """
    run = _checked(recipe, data, out, preset, [phase], init, encoder, options, None)
    with _started(run) as live:
        (only,) = run.phases
        trainer, *_ = phase_trainer(
            live.recipe, only, live.source(only), live.options, run.out, live.ranks,
            init=live.start,
        )  # fmt: skip
        return replay(trainer, step)


def with_device_defaults(
    options: TrainOptions, recipe: Recipe, device: torch.device
) -> TrainOptions:
    """The options with a precision and kernels that nobody chose taken from the device."""
    compute = options.compute
    return replace(
        options,
        compute=replace(
            compute,
            precision=compute.precision or recipe.precision or usual_precision(device),
            kernels=compute.kernels or usual_kernels(device),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """The arguments of a run after its checks."""

    recipe: Recipe
    phases: list[Phase]
    paths: dict[str, Path]  # data by phase
    out: Path
    init: str | None
    encoder: str | None
    options: TrainOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class _LiveRun:
    """A run on its ranks; the options have the device's defaults."""

    run: _Run
    ranks: Ranks
    options: TrainOptions
    start: Path | None  # the checkpoint of `init`

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    def source(self, phase: Phase) -> Source:
        """The samples of a phase."""
        return open_data(
            self.run.paths[phase.name],
            resolution=phase.resolution,
            square=not phase.multi_scale,
            encoder=self.run.encoder,
            device=self.ranks.device,
        )

    def validation(self, start: TransformerCheckpoint, folder: Path) -> Validate:
        """Validation images of a phase; prompts are encoded here, when the phase begins."""
        asked, precision = self.options.validation, self.options.compute.precision
        assert asked is not None and precision is not None
        drawn = Validation(
            asked.model,
            start.config,
            ValidationSettings(prompts=asked.prompts),
            self.ranks.device,
            autocast=None if precision is Precision.FP32 else DTYPES[precision],
            y_embedding=start.y_embedding,
        )

        def draw(weights: dict[str, Tensor], step: int) -> None:
            _log.info("%s", drawn.of_weights(weights, folder, step))

        return draw


def _checked(
    recipe: Recipe | str | Path,
    data: Mapping[str, str | Path],
    out: str | Path,
    preset: Preset | None,
    phases: Collection[str],
    init: str | None,
    encoder: str | None,
    options: TrainOptions,
    pipeline: str | None,
) -> _Run:
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe), preset)
    elif preset is not None:
        recipe = replace(recipe, preset=preset)
    out, chosen, validation = Path(out), chosen_phases(recipe, phases), options.validation
    if pipeline is not None and chosen[-1].of_classes:
        raise ConfigError(
            f"`pipeline` was requested, but the last phase is {chosen[-1].name}, of classes; run a "
            "text phase after it, or leave it out"
        )
    if validation is not None and all(phase.of_classes for phase in chosen):
        raise ConfigError(
            "validation images were requested, but no text phase is run, and a DiT draws none; "
            "leave out `validation`"
        )
    paths = data_paths(recipe, chosen, data)
    model = None if validation is None else validation.model
    check_places(out, paths, pipeline=pipeline, encoder=encoder, validation=model)
    check_results(recipe, chosen, out)
    return _Run(recipe=recipe, phases=chosen, paths=paths, out=out, init=init, encoder=encoder,
                options=options)  # fmt: skip


@contextmanager
def _started(run: _Run) -> Iterator[_LiveRun]:
    """Join the ranks; the device's defaults are chosen and the first checkpoint is found."""
    compute = run.options.compute
    with _deterministic(compute.reproducible), start_ranks(compute.device) as ranks:
        options = with_device_defaults(run.options, run.recipe, ranks.device)
        for phase in run.phases:
            run_settings(run.recipe, phase, options, ranks.num_ranks)  # refuses what cannot be
        start = None if run.init is None else _start_path(run.init, run.phases[0])
        yield _LiveRun(run=run, ranks=ranks, options=options, start=start)


def _run_phases(live: _LiveRun) -> Path:
    """Run those that are not done yet; return where the last one's averages are."""
    run, ranks, options, start, done = live.run, live.ranks, live.options, live.start, live.run.out
    validation = None if options.validation is None else live.validation
    for phase in run.phases:
        if is_done(run.recipe, phase, options, run.out):
            if ranks.is_first:
                unused = f"; the start {run.init} is not used" if start else ""
                _log.info("phase %s is done%s", phase.name, unused)
            done = result_path(phase, phase_folder(run.recipe, phase, run.out), Weights.EMA)
        else:
            source = live.source(phase)
            if ranks.is_first:
                _log.info("%s", _description(live, phase, source))
            done = run_phase(
                run.recipe, phase, source, options, run.out, ranks, init=start,
                validation=validation,
            )  # fmt: skip
        start = None  # of the first phase alone
    return done


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic operators, where a run is to be reproducible."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _num_parameters(recipe: Recipe) -> int:
    """Of the text model without micro-conditioning."""
    return sum(shape.numel() for shape in expected_shapes(recipe.model.config()).values())


def _start_path(model: str, phase: Phase) -> Path:
    """The checkpoint of a path, of tiny or of a hub id, for a phase."""
    folder = locate(model, ["transformer", "scheduler"])
    check_target("`init`", model, folder)
    return transformer_path(folder, model, phase.resolution)


def _write_pipeline(transformer: Path, model: str, out: Path) -> None:
    """Write a copy of the pipeline `model` with this transformer."""
    write_model(read_transformer(transformer), out, pipeline=locate(model, COMPONENTS))


def _description(live: _LiveRun, phase: Phase, source: Source) -> str:
    settings = run_settings(live.recipe, phase, live.options, live.ranks.num_ranks)
    return (
        f"phase {phase.name}: {len(source.bucket_of)} samples, {settings.steps} steps of "
        f"{global_batch(live.recipe, phase, live.options)} images in "
        f"{settings.micro_batches} micro-batches on {live.ranks.num_ranks} ranks, "
        f"lr {settings.lr:.3g}, warm-up {settings.warmup.steps:g} steps, {settings.optimizer}, "
        f"{settings.precision}"
    )
