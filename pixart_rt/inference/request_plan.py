"""What a request shape needs once, kept for the next request of the same shape.

A plan holds the positions of a batch, the modulation of every step, made in one batched call, and
the solver's coefficients; all on the device, so that the loop computes nothing on the host. Plans
are kept by image, and a batch's is put together from those of its images: mixed batches have too
many combinations of shapes to meet one again.

B images of a batch, S steps, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.scheduler_config import SchedulerSettings
from pixart_rt.config import ModelConfig, Scheduler
from pixart_rt.errors import BundleError, ConfigError
from pixart_rt.inference.cache_limits import PLAN_BYTES
from pixart_rt.inference.lru import Lru
from pixart_rt.inference.schedulers import dpmpp_coefficients, dpmpp_levels, scheduler_of
from pixart_rt.inference.step_cache import modulation_changes
from pixart_rt.model.embeddings import position_table
from pixart_rt.model.transformer import Modulator


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan depends on, within one bundle."""

    scheduler: Scheduler
    num_steps: int
    buckets: tuple[Bucket, ...]  # of the batch's images; their token counts are equal


@dataclass(frozen=True, slots=True)
class Plan:
    """Float32, on the device but the timesteps and coefficients."""

    key: PlanKey
    timesteps: Tensor  # [S], on the CPU
    pos_embed: Tensor  # [B, N, D]
    modulation: Tensor  # [S, B, 7, D]
    coefficients: (
        Tensor | None
    )  # [S, 8] of kernels/solver.py, on the CPU; None: not DPM-Solver++ 2M
    noise_scale: float  # of the initial noise
    changes: tuple[float, ...]  # of the modulation at each step, for step_cache.py

    @property
    def num_bytes(self) -> int:
        return self.pos_embed.nbytes + self.modulation.nbytes

    @staticmethod
    def cat(key: PlanKey, plans: Sequence[Plan]) -> Plan:
        """The plan of a batch from those of its images."""
        if len(plans) == 1:
            return plans[0]
        return replace(
            plans[0],
            key=key,
            pos_embed=torch.cat([plan.pos_embed for plan in plans]),
            modulation=torch.cat([plan.modulation for plan in plans], dim=1),
            changes=tuple(
                max(step) for step in zip(*(plan.changes for plan in plans), strict=True)
            ),
        )


class Planner:
    """Makes plans, and keeps those of single images."""

    def __init__(
        self,
        modulator: Modulator,
        config: ModelConfig,
        scheduler_folder: Path,
        device: torch.device,
        lossless: torch.dtype | None = None,
        max_bytes: int = PLAN_BYTES,
    ) -> None:
        """lossless: the dtype whose roundings are kept, for that quality.

        The scheduler's configuration is read and checked here. Raises CheckpointError.
        """
        self.modulator = modulator.to(lossless or torch.float32)
        self.config, self.device = config, device
        self.hits = self.misses = 0
        self.settings, self._lossless = SchedulerSettings.read(scheduler_folder), lossless
        self._kept: Lru[PlanKey, Plan] = Lru(lambda plan: plan.num_bytes, max_bytes=max_bytes)

    def __call__(self, key: PlanKey) -> Plan:
        plans = {bucket: self._of_bucket(key, bucket) for bucket in dict.fromkeys(key.buckets)}
        return Plan.cat(key, [plans[bucket] for bucket in key.buckets])

    def _of_bucket(self, key: PlanKey, bucket: Bucket) -> Plan:
        alone = replace(key, buckets=(bucket,))
        plan = self._kept.get(alone)
        if plan is None:
            self.misses += 1
            plan = self._make(alone)
            self._kept.put(alone, plan)
        else:
            self.hits += 1
        return plan

    def solver(self, key: PlanKey) -> Any:
        """A fresh diffusers scheduler with its timesteps set; it holds an image's history."""
        solver = scheduler_of(key.scheduler, self.settings)
        solver.set_timesteps(key.num_steps, device="cpu")
        return solver

    def _make(self, key: PlanKey) -> Plan:
        """The plan of one image."""
        coefficients, noise_scale = None, 1.0
        if key.scheduler is Scheduler.DPM_SOLVER:  # its noise levels need no diffusers
            levels = dpmpp_levels(self.settings, key.num_steps)
            steps = levels.timesteps
            with suppress(ConfigError):  # a checkpoint with another variant: diffusers' steps run
                coefficients = dpmpp_coefficients(levels, 1.0)
        else:
            solver = self.solver(key)
            steps, noise_scale = solver.timesteps, float(solver.init_noise_sigma)
        [bucket] = key.buckets
        positions, modulation = self._conditions(bucket, steps)
        return Plan(
            key,
            steps,
            positions.to(self.device),
            modulation.to(self.device),
            coefficients,
            noise_scale,
            tuple(modulation_changes(modulation).tolist()),
        )

    def _conditions(self, bucket: Bucket, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [1, N, D] and modulation [S, 1, 7, D] of one image.

        Micro-conditioning is the bucket's size in pixels and its height / width, float32, as in
        diffusers. Computed on the CPU in float32, whatever the engines' precision; for quality
        lossless in the engine's dtype, whose roundings are diffusers' then. So is the position
        table of the model's own square, which diffusers keeps as a buffer of its dtype.
        """
        steps = timesteps.float().cpu()
        size = torch.tensor([[bucket.height, bucket.width]], dtype=torch.float32)
        aspect_ratio = torch.tensor([bucket.height / bucket.width])
        with torch.no_grad():
            modulation = self.modulator(
                steps, size.expand(len(steps), 2), aspect_ratio.expand(len(steps))
            )
        positions = position_table(self.config, bucket.grid)
        if self._lossless and bucket.grid == (self.config.base_size, self.config.base_size):
            positions = positions.to(self._lossless)
        return positions.float(), modulation.float()[:, None]


def load_modulator(path: Path, config: ModelConfig) -> Modulator:
    """The bundle's modulator in float32. Raises BundleError if the file is missing or damaged."""
    with torch.device("meta"):
        modulator = Modulator(config)
    try:
        modulator.load_state_dict(load_file(path), assign=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} is damaged ({reason}); build the bundle again") from error
    return modulator.eval().requires_grad_(False)
