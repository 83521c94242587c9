"""One image that is asked for: its arguments checked once, and its defaults resolved once.

The command line, `PixArtPipeline.__call__` and `generate_many` all make this record; nothing after
it checks an argument again. torch is not imported, so that a command can refuse before it loads.
"""

from __future__ import annotations

import math
import operator
import random
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from pixart_rt.approximations import FirstBlockCache, StepCache
from pixart_rt.buckets import Bucket, choose_bucket
from pixart_rt.config import (
    DISTILLED,
    USUAL_STEPS,
    SamplingConfig,
    SamplingDefaults,
    Scheduler,
    is_trained_for,
)
from pixart_rt.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from pixart_rt.approximations import Approximation
    from pixart_rt.bundle import Manifest

DEFAULT_SEED = 0
LARGEST_SEED = 2**64 - 1  # of torch.Generator
LARGEST_DRAWN_SEED = 2**32 - 1  # short enough to read out and type again
LONGEST_TEXT = 4096  # characters; the longest text any model reads, 300 tokens, has about 1500
SMALLEST_SIDE, LARGEST_SIDE = 16, 16384  # pixels, of an image that is resized from its bucket
MOST_IMAGES = 10_000  # of one call, whose images are in memory together


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One image. None means the default, or in `generate_many` what the call says.

    Refuses what no checkpoint could do; `resolved` refuses the rest. A seed that is
    None is drawn when the record is made, and `seed` says which it is.
    """

    prompt: str | None = None  # or prompt_embeds
    negative_prompt: str | None = None  # the empty one
    seed: int | None = DEFAULT_SEED
    generator: torch.Generator | None = None  # draws the noise instead of a seed
    num_inference_steps: int | None = None  # the bundle's, else 20; 4 with LCM, 1 with DMD
    guidance_scale: float | None = None  # the bundle's, else 4.5; 1 with LCM and DMD
    guidance_interval: tuple[float, float] | None = None  # all steps
    scheduler: Scheduler | str | None = None  # the checkpoint's own
    force_scheduler: bool | None = None  # take one that the weights were not trained for
    approximate: Approximation | None = None
    aspect_ratio: str | None = None  # "W:H"
    height: int | None = None  # pixels
    width: int | None = None
    control_image: Image | None = None
    control_latents: Tensor | None = None  # [1, C, h, w], scaled
    prompt_embeds: Tensor | None = None  # [1, T, C]
    prompt_attention_mask: Tensor | None = None  # [1, T]
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(name, value))
        if self.negative_prompt is None:
            object.__setattr__(self, "negative_prompt", "")
        if self.generator is not None:
            self._take_generator()
        elif self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randint(0, LARGEST_DRAWN_SEED))
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ConfigError(
                f"{'no' if self.prompt is None else 'both a'} prompt and prompt_embeds were given; "
                "give prompt, or prompt_embeds with prompt_attention_mask, one of the two"
            )
        if self.negative_prompt and self.negative_prompt_embeds is not None:
            raise ConfigError(
                "negative_prompt and negative_prompt_embeds were both given; give one of the two"
            )
        if (self.height is None) != (self.width is None):
            raise ConfigError("height and width go together; one was given without the other")
        if self.height is not None and self.aspect_ratio is not None:
            raise ConfigError("give aspect_ratio or height and width, not both")

    def _take_generator(self) -> None:
        if not callable(getattr(self.generator, "initial_seed", None)):
            raise ConfigError(_unexpected("generator", "a torch.Generator", self.generator))
        assert self.generator is not None
        drawn_from = self.generator.initial_seed()
        if self.seed not in (None, DEFAULT_SEED, drawn_from):
            raise ConfigError(f"seed {self.seed} and a generator were given; give one of the two")
        object.__setattr__(self, "seed", drawn_from)

    def filled(self, **defaults: Any) -> Request:
        """The same request with `defaults` where it says nothing."""
        return replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def resolved(self, manifest: Manifest) -> ResolvedRequest:
        """What a bundle makes of the request. Raises ConfigError for what it cannot."""
        resolution = int(manifest.engine_config["resolution"])
        bucket = choose_bucket(resolution, self.aspect_ratio, self.height, self.width)
        return ResolvedRequest(request=self, sampling=self._sampling(manifest), bucket=bucket)

    def _sampling(self, manifest: Manifest) -> SamplingConfig:
        """The settings that are asked, else the checkpoint's own."""
        own = Scheduler(manifest.scheduler)
        scheduler = own if self.scheduler is None else Scheduler(self.scheduler)
        trained = is_trained_for(own, scheduler)
        stated = manifest.sampling_defaults if trained else SamplingDefaults()
        usual = SamplingConfig()
        guidance_scale, steps = self.guidance_scale, self.num_inference_steps
        if guidance_scale is None and scheduler in DISTILLED:
            guidance_scale = 1.0
        if guidance_scale is None:
            scale = stated.guidance_scale
            guidance_scale = usual.guidance_scale if scale is None else scale
        if steps is None:
            steps = stated.num_inference_steps or USUAL_STEPS.get(
                scheduler, usual.num_inference_steps
            )
        settings = SamplingConfig(
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            guidance_interval=self.guidance_interval or (0.0, 1.0),
            approximate=self.approximate,
        )
        if scheduler in DISTILLED and settings.guided:
            raise ConfigError(
                f"guidance_scale {guidance_scale} is not supported with {scheduler}, whose "
                "guidance is distilled into the model; leave it out or use 1"
            )
        if scheduler is Scheduler.IDDPM and not manifest.config.learned_variance:
            raise ConfigError("iddpm needs a model with learned variance; use ddim")
        if not trained and not self.force_scheduler:
            raise ConfigError(
                f"scheduler {scheduler} was requested of {manifest.model['name']}, whose weights "
                f"were trained for {own}: its images would be ruined; leave it out, or insist with "
                "force_scheduler"
            )
        return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """A request with a bundle's defaults, the only form that sampling sees."""

    request: Request
    sampling: SamplingConfig
    bucket: Bucket  # the trained size at which the image is made


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int, also NumPy's. Raises ConfigError for others, and outside the range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(_unexpected(name, "a whole number", value)) from None
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ConfigError(f"{name} must be {bound}, got {number}")
    return number


def checked_text(name: str, value: Any) -> str:
    """`value`, a text of bounded length in valid Unicode. Raises ConfigError for others."""
    if not isinstance(value, str):
        raise ConfigError(_unexpected(name, "text", value))
    if len(value) > LONGEST_TEXT:
        raise ConfigError(
            f"{name} has {len(value)} characters, the most is {LONGEST_TEXT}; shorten it: the "
            "model reads only the first tokens"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} {reprlib.repr(value)} is not valid UTF-8; type it again") from (
            None
        )
    return value


def _unexpected(name: str, kind: str, value: Any) -> str:
    return f"{name} must be {kind}, got {reprlib.repr(value)} ({type(value).__name__})"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(_unexpected(name, "a number", value))
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    return float(value)


def _interval(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ConfigError(_unexpected(name, "two fractions of the steps, such as (0, 0.5)", value))
    first, last = (_number(name, end) for end in value)
    return first, last


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(_unexpected(name, "True or False", value))
    return value


def _scheduler(name: str, value: Any) -> Scheduler:
    try:
        return Scheduler(value)
    except ValueError:
        known = ", ".join(Scheduler)
        raise ConfigError(f"{name} {reprlib.repr(value)} is unknown; choose from {known}") from None


def _approximation(name: str, value: Any) -> Approximation:
    if not isinstance(value, StepCache | FirstBlockCache):
        raise ConfigError(_unexpected(name, "a StepCache or a FirstBlockCache", value))
    return value


def _picture(name: str, value: Any) -> Any:
    if not callable(getattr(value, "convert", None)):
        raise ConfigError(_unexpected(name, "a PIL image", value))
    return value


def _tensor(name: str, value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "device"):
        raise ConfigError(_unexpected(name, "a tensor", value))
    return value


def _side(name: str, value: Any) -> int:
    return whole_number(name, value, SMALLEST_SIDE, LARGEST_SIDE)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": checked_text,
    "negative_prompt": checked_text,
    "seed": lambda name, value: whole_number(name, value, 0, LARGEST_SEED),
    # The most a sampler takes is said by SamplingConfig, which knows the sampler.
    "num_inference_steps": lambda name, value: whole_number(name, value, -(2**63), 2**63),
    "guidance_scale": _number,
    "guidance_interval": _interval,
    "scheduler": _scheduler,
    "force_scheduler": _switch,
    "approximate": _approximation,
    "aspect_ratio": checked_text,
    "height": _side,
    "width": _side,
    "control_image": _picture,
    "control_latents": _tensor,
    "prompt_embeds": _tensor,
    "prompt_attention_mask": _tensor,
    "negative_prompt_embeds": _tensor,
    "negative_prompt_attention_mask": _tensor,
}
