"""A checkpoint's scheduler_config.json, read and checked once, when the checkpoint is.

Two kinds of settings are in it. How the model was trained (the betas, what it predicts, zero
terminal SNR) holds for every sampler. How its own sampler steps (spacing, order, kind of sigmas)
holds for DPM-Solver++, as diffusers takes it over from another sampler's file, and for LCM if the
file is LCM's; the others step as in the PixArt code (inference/schedulers.py).

A flow-matching model (FlowMatchEulerDiscreteScheduler, or `use_flow_sigmas`) is sampled by
DPM-Solver++ on the flow's sigmas, shifted as the file says. A setting that none of our samplers has
is an error, not a default: dynamic shifting, a class of another family of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pixart_rt.config import Scheduler
from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json

CONFIG = "scheduler_config.json"
LCM_CLASS = "LCMScheduler"
CLASSES = frozenset({  # samplers of models that predict from noise of a variance-preserving process
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DDPMScheduler",
    "DDIMScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", LCM_CLASS,
})  # fmt: skip
FLOW_CLASSES = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})

TRAINING: dict[str, Any] = {  # of PixArt and DiT; with the values of diffusers where it is not said
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
SOLVER: dict[str, Any] = {  # of DPM-Solver++, with the defaults of diffusers
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "thresholding": False,
    "lower_order_final": True,
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_OF_OTHER_SAMPLERS = {  # words of DEIS, UniPC and SA-Solver, and what DPM-Solver++ makes of them
    "algorithm_type": dict.fromkeys(("deis", "data_prediction", "noise_prediction"), "dpmsolver++"),
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}
_SIGMAS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas",
)  # fmt: skip
_UNSUPPORTED = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal", "stochastic_sampling")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    """The checked settings of a folder, or PixArt's own where it has none."""

    class_name: str
    stored: Mapping[str, Any]  # as in the file, for diffusers' classes
    source: str  # for messages

    @classmethod
    def read(cls, folder: Path) -> SchedulerSettings:
        """Those of folder/scheduler_config.json. Raises CheckpointError for what cannot be run."""
        path = Path(folder) / CONFIG
        stored: Any = {}
        if path.is_file():
            try:
                stored = read_json(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            if not isinstance(stored, dict):
                raise CheckpointError(f"{path} holds no settings but {type(stored).__name__}")
        name = str(stored.get("_class_name", "DPMSolverMultistepScheduler"))
        return cls(class_name=name, stored=stored or TRAINING, source=str(path))

    def __post_init__(self) -> None:
        if self.class_name not in CLASSES | FLOW_CLASSES:
            raise CheckpointError(
                f"{self.source} is of {self.class_name}, and none of our samplers runs such a "
                "model; PixArt checkpoints have DPMSolverMultistepScheduler or LCMScheduler"
            )
        for key in _UNSUPPORTED:
            if self.stored.get(key):
                self._refuse(key, "which none of our samplers has; leave it out")
        for key, (is_valid, wanted) in _CHECKS.items():
            if self.stored.get(key) is not None and not is_valid(self.stored[key]):
                self._refuse(key, f"it must be {wanted}")
        if self["beta_start"] > self["beta_end"]:
            self._refuse("beta_start", f"above beta_end {self['beta_end']!r}")
        betas = self["trained_betas"]
        if betas is not None and len(betas) != self["num_train_timesteps"]:
            self._refuse("num_train_timesteps", f"but there are {len(betas)} trained_betas")
        if self["use_flow_sigmas"] and self["prediction_type"] != "flow_prediction":
            self._refuse("use_flow_sigmas", "which needs prediction_type flow_prediction")
        if self["prediction_type"] == "flow_prediction" and not self["use_flow_sigmas"]:
            self._refuse("prediction_type", "which needs use_flow_sigmas")
        sigmas = [key for key in _SIGMAS if self[key]]
        if len(sigmas) > 1:
            self._refuse(sigmas[1], f"and {sigmas[0]} too; only one can be")
        if self["use_beta_sigmas"] and find_spec("scipy") is None:
            self._refuse("use_beta_sigmas", "which needs scipy: pip install scipy")
        if self.is_flow and self["algorithm_type"] not in ("dpmsolver++", "sde-dpmsolver++"):
            self._refuse("algorithm_type", "but a flow-matching model needs dpmsolver++")
        if self["final_sigmas_type"] == "zero" and not self["algorithm_type"].endswith("++"):
            self._refuse("algorithm_type", "which needs final_sigmas_type sigma_min")

    def __getitem__(self, key: str) -> Any:
        """A setting of TRAINING or SOLVER, by default diffusers'."""
        if self.class_name in FLOW_CLASSES:  # they say it by their name
            implied = {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": self.stored.get("shift") or 1.0,
            }
            if key in implied:
                return implied[key]
        value = self.stored.get(key)
        if value is None:
            value = TRAINING[key] if key in TRAINING else SOLVER[key]
        return _OF_OTHER_SAMPLERS[key].get(value, value) if key in _OF_OTHER_SAMPLERS else value

    @property
    def training(self) -> dict[str, Any]:
        """What holds for every sampler."""
        return {key: self[key] for key in TRAINING}

    @property
    def is_flow(self) -> bool:
        """Whether the model predicts the velocity of a straight path from data to noise."""
        return bool(self["use_flow_sigmas"])

    @property
    def for_diffusers(self) -> dict[str, Any]:
        """The whole, as diffusers' DPMSolverMultistepScheduler takes it."""
        of_flow = ("prediction_type", "use_flow_sigmas", "flow_shift") if self.is_flow else ()
        return {**self.stored, **{key: self[key] for key in (*_OF_OTHER_SAMPLERS, *of_flow)}}

    @property
    def sampler(self) -> Scheduler:
        """The sampler that the checkpoint asks for: LCM, or DPM-Solver++.

        A DMD student's folder names DDPM, as those of other checkpoints do, so DMD must be asked
        for.
        """
        return Scheduler.LCM if self.class_name == LCM_CLASS else Scheduler.DPM_SOLVER

    def _refuse(self, key: str, reason: str) -> None:
        raise CheckpointError(f"{self.source}: {key} is {self.stored.get(key)!r}; {reason}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_beta(value: object) -> bool:
    return _is_number(value) and 0 < value < 1  # type: ignore[operator]


def _is_count(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and value >= least


def _one_of(*names: str) -> tuple[Callable[[object], bool], str]:
    return (lambda value: value in names), f"one of {', '.join(names)}"


_SHIFT = ((lambda value: _is_number(value) and 0 < value <= 1000), "above 0 and at most 1000")
_BOOLEAN: tuple[Callable[[object], bool], str] = (
    (lambda value: isinstance(value, bool)),
    "a boolean",
)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (_is_count(1), "a count"),
    "beta_start": (_is_beta, "between 0 and 1"),
    "beta_end": (_is_beta, "between 0 and 1"),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (
        lambda value: isinstance(value, list) and all(map(_is_beta, value)),
        "a list of numbers between 0 and 1",
    ),
    "prediction_type": _one_of("epsilon", "v_prediction", "sample", "flow_prediction"),
    "shift": _SHIFT,
    "flow_shift": _SHIFT,
    "solver_order": (lambda value: value in (1, 2, 3), "1, 2 or 3"),
    "algorithm_type": _one_of(
        "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis", "data_prediction",
        "noise_prediction",
    ),
    "solver_type": _one_of("midpoint", "heun", "logrho", "bh1", "bh2"),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "timestep_spacing": _one_of("linspace", "leading", "trailing"),
    "steps_offset": (_is_count(0), "0 or more"),
    "lambda_min_clipped": (_is_number, "a number"),
    **dict.fromkeys(
        ("rescale_betas_zero_snr", "thresholding", "lower_order_final", "euler_at_final", *_SIGMAS),
        _BOOLEAN,
    ),
}  # fmt: skip
