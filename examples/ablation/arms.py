"""The arms of the ablation: what is trained, from what, on which captions, for how many steps.

    dit                S steps of classes; the start of the arms that start from it
    reparameterized    S steps of text from it
    adaln              the same with a linear in every block (adaln.py)
    sparse             as reparameterized, with captions that name one thing
    scratch            2 S steps of text from random weights

Equal budgets: at S steps of text `scratch` is what re-parameterisation is compared with; at 2 S it
has seen as many images as `dit` and `reparameterized` together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from examples.tiny.data import Scenes
from pixart_rt.errors import ConfigError
from pixart_rt.files import replacing
from pixart_rt.training.run_settings import OptimizerKind

RESOLUTIONS = (64, 128, 256)
POINTS = 4  # scores in S steps
UNITS = 6  # S steps, over all arms


class Arm(StrEnum):
    """In the order in which they run."""

    DIT = "dit"
    REPARAMETERIZED = "reparameterized"
    ADALN = "adaln"
    SPARSE = "sparse"
    SCRATCH = "scratch"

    @property
    def data(self) -> Scenes:
        return {Arm.DIT: Scenes.CLASSES, Arm.SPARSE: Scenes.SPARSE}.get(self, Scenes.DENSE)

    @property
    def length(self) -> int:
        """In units of S steps."""
        return 2 if self is Arm.SCRATCH else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all arms share. Kept in the run's folder: a run resumes with its own."""

    steps: int  # S
    resolution: int = 128  # pixels per side
    batch: int = 32
    num_scenes: int = 6000  # of each kind, at most
    points: int = POINTS
    captions: int = 48  # that a score asks for, all held out
    sampling_steps: int = 12
    guidance_scale: float = 3.0
    num_layers: int = 8
    num_heads: int = 2
    lr: float = 2.2e-3
    optimizer: OptimizerKind = OptimizerKind.MUON
    timestep_shift: float = 2.0
    ema_decay: float = 0.98
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(f"resolution {self.resolution} is not one of {RESOLUTIONS}")
        for name in ("steps", "batch", "num_scenes", "points", "captions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.steps % self.points:
            raise ConfigError(
                f"{self.steps} steps do not divide into {self.points} scores; use a multiple"
            )

    @property
    def scenes(self) -> int:
        """Of each kind: no more than the longest arm can see."""
        return min(self.num_scenes, Arm.SCRATCH.length * self.steps * self.batch)

    @property
    def score_every(self) -> int:
        return self.steps // self.points

    def to_dict(self) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, StrEnum) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**{**values, "optimizer": OptimizerKind(values["optimizer"])})


def steps_within(seconds: float, seconds_per_step: float, points: int) -> int:
    """S, a multiple of `points`, such that all arms take about `seconds`, a quarter of it for
    encoding scenes and drawing what is scored."""
    steps = int(0.75 * seconds / seconds_per_step / UNITS)
    return max(steps // points * points, points)


def planned(out: Path, asked: dict[str, Any], find_steps: Callable[[dict[str, Any]], int]) -> Plan:
    """The plan in a folder; a new folder's has the settings `asked`, and steps from `find_steps`
    where they are not among them.

    Raises ConfigError where the folder's plan is another than was requested.
    """
    path = Path(out) / "plan.json"
    if path.exists():
        plan = Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
        for name, value in asked.items():
            if getattr(plan, name) != value:
                raise ConfigError(
                    f"{name} {value} was requested, but the ablation in {out} has "
                    f"{getattr(plan, name)}; resume without that setting, or choose another folder"
                )
        return plan
    if Path(out).is_dir() and any(each.name[0] != "." for each in Path(out).iterdir()):
        raise ConfigError(f"{out} holds something else than an ablation; choose another folder")
    plan = Plan(**asked) if "steps" in asked else Plan(steps=find_steps(asked), **asked)
    with replacing(path) as new:
        new.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    return plan
