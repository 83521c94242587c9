"""The settings that trade exactness for work: asked for, never a default.

All else that the pipeline leaves out changes no image (config.Saving); these do. What they do is in
inference/step_cache.py; `pixart-rt fidelity` measures what they cost on a fixed set of prompts. The
third of their kind is `SamplingConfig.guidance_interval`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixart_rt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepCache:
    """Reuse the model's previous output at steps whose modulation has changed little.

    After TeaCache (arXiv:2411.19108). `threshold` bounds the summed relative L1 change of the
    modulation since the last step that ran the model; 0 skips none. Which steps are skipped follows
    from sampler, steps and size alone: the same for every prompt, on every backend.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check("step cache", self.threshold)

    def __str__(self) -> str:
        return f"step-cache {self.threshold:g}"


@dataclass(frozen=True, slots=True)
class FirstBlockCache:
    """Reuse what the blocks after the first added, at steps where the first adds much the same.

    `threshold` bounds the relative L1 change of what the first block adds, against the last step
    that ran all blocks; 0 skips none. It depends on the image, needs the backend torch, and the
    host waits for the device once in each step.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check("first-block cache", self.threshold)

    def __str__(self) -> str:
        return f"first-block-cache {self.threshold:g}"


Approximation = StepCache | FirstBlockCache


def one_approximation(
    step_cache: float | None, first_block_cache: float | None
) -> Approximation | None:
    """The setting that two thresholds ask for, None without any. Raises ConfigError for both."""
    for name, threshold in (("step cache", step_cache), ("first-block cache", first_block_cache)):
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(
                f"{name} {threshold:g} is not supported; its threshold is from 0 to 1, such as 0.1"
            )
    if step_cache is not None and first_block_cache is not None:
        raise ConfigError(
            f"step cache {step_cache:g} and first-block cache {first_block_cache:g} were "
            "requested; both reuse earlier steps, so choose one"
        )
    if step_cache is not None:
        return StepCache(step_cache)
    return None if first_block_cache is None else FirstBlockCache(first_block_cache)


def _check(name: str, threshold: float) -> None:
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ConfigError(
            f"the threshold of the {name} must be a number >= 0, such as 0.1, got {threshold}"
        )
