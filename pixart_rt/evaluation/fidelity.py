"""What approximate settings do to images: each against the exact one of the same prompt and seed.

Only likeness and skipped work are measured here, no time. A student (LCM, DMD) is another
checkpoint and draws another image even where it is as good, so its PSNR is low by nature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixart_rt.approximations import Approximation
from pixart_rt.config import SamplingConfig
from pixart_rt.errors import ConfigError
from pixart_rt.evaluation.similarity import mean_squared_error, psnr_of, ssim
from pixart_rt.inference.pipeline import PixArtPipeline

PROMPTS = (  # the fixed set; what the tiny checkpoint can draw, and any other too
    "a red circle",
    "a small green star",
    "a large purple square on a black background",
    "a red circle above a blue square",
    "a yellow triangle to the left of a green circle",
    "an orange star below a small blue triangle",
    "three shapes in a row: a blue circle, a red square and a yellow star",
    "a picture of a large green triangle above a small orange circle on a gray background",
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A setting to judge. What is None stays as in the exact run."""

    name: str
    approximate: Approximation | None = None
    guidance_stop: float | None = None  # the part of the steps that is guided
    student: PixArtPipeline | None = None  # a few-step checkpoint, with a sampler of its own
    scheduler: str | None = None  # the student's
    num_inference_steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """One image against the exact one."""

    prompt: str
    seed: int
    mean_squared_error: float
    ssim: float
    skipped_steps: tuple[int, ...]
    unguided_steps: tuple[int, ...]  # that the exact run guides, by their number

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "psnr_db": _finite(psnr_of(self.mean_squared_error)),
            "ssim": self.ssim,
            "skipped_steps": list(self.skipped_steps),
            "unguided_steps": list(self.unguided_steps),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A variant with its images."""

    name: str
    num_steps: int
    images: list[Likeness] = field(default_factory=list)

    @property
    def psnr(self) -> float:
        """In dB, of the mean squared error over all images."""
        return psnr_of(float(np.mean([each.mean_squared_error for each in self.images])))

    @property
    def worst_psnr(self) -> float:
        return psnr_of(max(each.mean_squared_error for each in self.images))

    @property
    def ssim(self) -> float:
        return float(np.mean([each.ssim for each in self.images]))

    @property
    def worst_ssim(self) -> float:
        return min(each.ssim for each in self.images)

    @property
    def skipped(self) -> float:
        """Steps, the mean over the images."""
        return float(np.mean([len(each.skipped_steps) for each in self.images]))

    @property
    def unguided(self) -> int:
        return len(self.images[0].unguided_steps)

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.name,
            "steps": self.num_steps,
            "mean_skipped_steps": self.skipped,
            "unguided_steps": self.unguided,
            "psnr_db": _finite(self.psnr),
            "worst_psnr_db": _finite(self.worst_psnr),
            "ssim": self.ssim,
            "worst_ssim": self.worst_ssim,
            "images": [each.to_dict() for each in self.images],
        }


def judge(
    pipe: PixArtPipeline,
    variants: Sequence[Variant],
    *,
    prompts: Sequence[str] = PROMPTS,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Judged]:
    """Each variant in turn; image k draws from seed + k, in the exact run and in all others.

    The exact run uses the bundle's own sampler. One image at a time, because the first-block cache
    decides for a batch. Raises ConfigError without variants or prompts, and as the pipeline does.
    """
    if not variants or not prompts:
        raise ConfigError(
            f"{len(variants)} settings and {len(prompts)} prompts were given to compare; give at "
            "least one of each, such as --step-cache 0.1"
        )
    report = progress or (lambda _name, _done, _total: None)
    total, done = (1 + len(variants)) * len(prompts), 0
    exact: list[NDArray[np.uint8]] = []
    for index, prompt in enumerate(prompts):
        report("exact", done, total)
        result = pipe(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed + index,
        )
        exact.append(np.asarray(result.images[0]))
        done += 1
    judged = []
    for variant in variants:
        steps = variant.num_inference_steps or num_inference_steps
        found = Judged(name=variant.name, num_steps=steps)
        interval = (0.0, 1.0 if variant.guidance_stop is None else variant.guidance_stop)
        sampling = SamplingConfig(num_inference_steps=num_inference_steps,
                                  guidance_interval=interval)  # fmt: skip
        unguided = tuple(
            step
            for step in range(num_inference_steps)
            if variant.guidance_stop is not None and not sampling.guides(step)
        )
        for index, prompt in enumerate(prompts):
            report(variant.name, done, total)
            student = variant.student
            result = (student or pipe)(
                prompt,
                num_inference_steps=steps,
                guidance_scale=None if student else guidance_scale,
                guidance_interval=interval,
                scheduler=variant.scheduler,
                force_scheduler=student is not None,  # it is measured whatever it was trained for
                seed=seed + index,
                approximate=variant.approximate,
            )
            image = np.asarray(result.images[0])
            found.images.append(
                Likeness(
                    prompt=prompt,
                    seed=seed + index,
                    mean_squared_error=mean_squared_error(image, exact[index]),
                    ssim=ssim(image, exact[index]),
                    skipped_steps=result.skipped_steps[0],
                    unguided_steps=unguided,
                )
            )
            done += 1
        judged.append(found)
    return judged


def _finite(decibels: float) -> float | None:
    """For JSON, which has no infinity: None where the images are equal."""
    return None if decibels == float("inf") else decibels
