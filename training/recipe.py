"""A training recipe: the phases of a run, read from TOML into settings that refuse to be wrong.

    recipe = read_recipe(Path("recipes/pixart-alpha.toml"))
    for line in report(recipe): print(line)          # recipe_report.py

Imports no torch; what the two presets do is in presets.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import pixart_rt
from pixart_rt.buckets import RESOLUTIONS, VAE_SCALE_FACTOR
from pixart_rt.config import ModelConfig, Precision
from pixart_rt.errors import ConfigError
from pixart_rt.training.optimizer_settings import (
    OptimizerTable,
    PhaseOptimizer,
    PhaseOverrides,
    nearest,
    phase_optimizer,
)
from pixart_rt.training.presets import PRESETS, Preset, Settings
from pixart_rt.training.reparameterize_settings import TextStart
from pixart_rt.training.run_settings import OptimizerKind
from pixart_rt.training.toml_settings import read_settings

RECIPES = Path(pixart_rt.__file__).parent / "recipes"  # a link in a checkout, a folder in a wheel


class Stage(StrEnum):
    """The paper's three stages (Section 2.2)."""

    PIXEL_DEPENDENCY = "pixel-dependency"
    """A class-conditional DiT."""
    TEXT_IMAGE_ALIGNMENT = "text-image-alignment"
    HIGH_AESTHETICS = "high-aesthetics"


class Start(StrEnum):
    """Where a phase's weights come from."""

    RANDOM = "random"
    PREVIOUS = "previous"
    """The phase before, of the same kind; in the first phase a checkpoint that the run is given."""
    REPARAMETERIZED = "reparameterized"
    """The phase before, a DiT, made a text model; in the first phase a DiT the run is given."""


class Weights(StrEnum):
    """Which of the weights of the phase before."""

    EMA = "ema"
    RAW = "raw"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The model of all phases; the default is XL/2 with T5-XXL, and ImageNet's classes."""

    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    caption_channels: int = 4096
    max_text_tokens: int = 120
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be positive, got {self.num_classes}")
        self.config()  # refuses what cannot be

    def config(self) -> ModelConfig:
        """The text model, as in the 256 px phases."""
        return ModelConfig(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            caption_channels=self.caption_channels,
            max_text_tokens=self.max_text_tokens,
            sample_size=32,
            interpolation_scale=1.0,
            micro_conditioning=False,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase(PhaseOverrides):
    """One row of the paper's Table 4, and settings of the optimiser for this phase alone."""

    name: str
    stage: Stage
    start: Start
    start_weights: Weights = Weights.EMA
    resolution: int  # pixels per side of the square; with multi_scale of its area
    multi_scale: bool = False  # all 40 aspect ratios, one in each step
    micro_conditioning: bool = False
    data: str
    num_images: int
    steps: int  # of the optimiser
    batch_per_gpu: int
    original_batch_per_gpu: int | None = None  # in the released configuration, if it differs
    num_gpus: int
    timestep_shift: float = 1.0  # above 1, more noise; 1, uniform timesteps, is the paper's
    interpolation_scale: float | None = None  # of positions; None: of a start of this resolution
    v100_days: float | None = None  # what the paper's run took
    in_original_code: bool = True

    def __post_init__(self) -> None:
        PhaseOverrides.__post_init__(self)
        for name in ("num_images", "steps", "batch_per_gpu", "num_gpus", "timestep_shift"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.interpolation_scale is not None and not 0 < self.interpolation_scale < 100:
            raise ConfigError(
                f"interpolation_scale must be above 0 and below 100, got {self.interpolation_scale}"
            )
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(f"resolution {self.resolution} is not one of {RESOLUTIONS}")
        if self.of_classes and (self.multi_scale or self.micro_conditioning):
            raise ConfigError(f"stage {self.stage} trains squares; leave out multi_scale and "
                              "micro_conditioning")  # fmt: skip
        if self.of_classes and self.start is Start.REPARAMETERIZED:
            raise ConfigError(
                f"stage {self.stage} cannot start {self.start}, which makes a text model"
            )

    @property
    def of_classes(self) -> bool:
        """Whether labels condition this phase, not text."""
        return self.stage is Stage.PIXEL_DEPENDENCY

    def images_per_gpu(self, settings: Settings) -> int:
        """Images that one GPU computes at a time."""
        own = self.original_batch_per_gpu if settings.original_batches else None
        return own or self.batch_per_gpu

    def global_batch(self, settings: Settings) -> int:
        """Images of one optimiser step, of all GPUs."""
        return self.images_per_gpu(settings) * self.num_gpus

    def num_samples(self, settings: Settings) -> int:
        """Images that the phase sees, repeated ones counted each time."""
        return self.steps * self.global_batch(settings)

    def model_config(self, settings: Settings, model: ModelConfig) -> ModelConfig:
        """`model` at this phase's resolution, positions and micro-conditioning."""
        return replace(
            model,
            sample_size=self.resolution // VAE_SCALE_FACTOR,
            interpolation_scale=self.interpolation_scale
            or settings.interpolation_scale(self.resolution),
            micro_conditioning=self.micro_conditioning,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run: its phases in order, and what they share."""

    preset: Preset
    phases: tuple[Phase, ...]
    model: ModelShape = field(default_factory=ModelShape)
    ema_decay: float = 0.9999
    text_dropout: float = 0.1  # captions replaced by the null of the model's `cfg_null`
    label_dropout: float = 0.1
    min_snr_gamma: float | None = None
    optimizer: OptimizerTable = field(default_factory=OptimizerTable)
    precision: Precision | None = None  # of matrix products; None: what the device does well
    text_start: TextStart = field(default_factory=TextStart)

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"phases need names of their own, and at least one; got {names}")
        for name in ("ema_decay", "text_dropout", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        before: Phase | None = None
        for phase in self.phases:
            self._check_order(before, phase)
            self.phase_optimizer(phase)  # refuses what cannot be
            before = phase

    @staticmethod
    def _check_order(before: Phase | None, phase: Phase) -> None:
        if before is None or phase.start is Start.RANDOM:
            return
        was_dit = phase.of_classes or phase.start is Start.REPARAMETERIZED
        if before.of_classes != was_dit:
            raise ConfigError(
                f"phase {phase.name}, stage {phase.stage}, starts {phase.start}, but before it is "
                f"{before.name}, stage {before.stage}; a DiT becomes a text model by "
                f"{Start.REPARAMETERIZED}, and stays what it is by {Start.PREVIOUS}"
            )

    @property
    def settings(self) -> Settings:
        return PRESETS[self.preset]

    def phase_optimizer(
        self, phase: Phase, *, batch: int | None = None, kind: OptimizerKind | None = None
    ) -> PhaseOptimizer:
        """The optimiser of a phase; `batch` and `kind` replace the recipe's.

        Raises ConfigError for settings that it cannot take.
        """
        try:
            return phase_optimizer(
                self.settings,
                nearest(self.optimizer, phase),
                kind or self.optimizer.kind,
                batch=batch or phase.global_batch(self.settings),
                num_gpus=phase.num_gpus,
            )
        except ConfigError as error:
            raise ConfigError(f"phase {phase.name}: {error}") from error


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package, such as tiny.

    Raises ConfigError, which lists the names, for a name that is neither.
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path  # a path that does not exist is the reader's to refuse
    ours = {found.stem: found for found in sorted(RECIPES.glob("*.toml"))}
    if path.name not in ours:
        raise ConfigError(
            f"{name} is neither a file here nor a recipe of the package; there are "
            f"{', '.join(ours)}, or give a .toml file of yours"
        )
    return ours[path.name]


def read_recipe(path: str | Path, preset: Preset | None = None) -> Recipe:
    """The recipe in a TOML file, or of that name in the package (find_recipe).

    `preset` replaces the file's. Raises ConfigError, one line.
    """
    recipe = read_settings(Recipe, find_recipe(path))
    return recipe if preset is None else replace(recipe, preset=preset)
