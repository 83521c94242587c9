"""A small run for tests: made-up samples of three buckets, a small text model, any ranks.

    python small_run.py OUT STEPS [--set name=value ...] [--kill-at STEP] [--print]

Started by a test with torchrun's variables, or alone. Prints a line of JSON for every step: its
number, bucket, loss of this rank's samples and norm; at the end the weights' digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig, Precision
from pixart_rt.data.batch import Batch
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.process_group import Ranks, start_ranks
from pixart_rt.training.run_settings import Checkpointing, OptimizerKind, Parallel, RunSettings
from pixart_rt.training.sampler import BucketSampler
from pixart_rt.training.trainer import StepResult, Trainer
from pixart_rt.training.weight_init import initial_value

BUCKETS = tuple(
    Bucket(ratio=h / w, height=16 * h, width=16 * w) for h, w in ((3, 4), (2, 5), (4, 3))
)
TOKENS, TEXT, WIDTH = [bucket.num_tokens for bucket in BUCKETS], 6, 10
NUM_SAMPLES = 37
MODEL = ModelConfig(
    num_layers=3, num_heads=2, head_dim=72, caption_channels=WIDTH, max_text_tokens=TEXT,
    sample_size=32, interpolation_scale=1.0, micro_conditioning=True,
)  # fmt: skip


def sample(number: int) -> dict[str, Tensor]:
    """A made-up sample; the same for the same number."""
    random = torch.Generator().manual_seed(1000 + number)
    bucket = BUCKETS[number % len(BUCKETS)]
    tokens = 1 + number % TEXT
    text = torch.randn(TEXT, WIDTH, generator=random).bfloat16()
    text[tokens:] = 0
    return {
        "latents": torch.randn(4, bucket.height // 8, bucket.width // 8, generator=random),
        "prompt_embeds": text,
        "prompt_mask": torch.arange(TEXT) < tokens,
        "original_size": torch.tensor([300.0 + number, 200.0]),
        "aspect_ratio": torch.tensor([bucket.ratio]),
    }


@dataclass
class MadeUpFeed:
    """The Feed of a rank. At step `poisoned` one sample is not a number."""

    sampler: BucketSampler
    ranks: Ranks
    poisoned: int | None = None

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        ids = self.sampler.ids(step, self.ranks.rank, self.ranks.num_ranks)
        parts = [sample(int(each)) for each in ids]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        if step == self.poisoned and self.ranks.is_first:
            stacked["latents"][0, 0, 0, 0] = torch.nan
        bucket = BUCKETS[self.sampler.global_batch(step).bucket]
        return Batch(ids=torch.from_numpy(ids), bucket=bucket, **stacked)


def make_sampler(multiple: int = 4) -> BucketSampler:
    owners = [number % len(BUCKETS) for number in range(NUM_SAMPLES)]
    return BucketSampler(owners, TOKENS, token_budget=100, multiple=multiple, seed=5)


def make_objective(text_dropout: float = 0.3) -> TextObjective:
    model = PixArtTransformer(MODEL)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(initial_value(name, each.shape, random))
            if name.endswith(("cross_attn.proj.weight", "final_layer.linear.weight")):
                each.normal_(std=0.05, generator=random)  # or nothing before it would learn
    null = NullText(torch.randn(TEXT, WIDTH, generator=random), torch.arange(TEXT) < 1)
    return TextObjective(model, GaussianDiffusion(), null, text_dropout)


def make_settings(steps: int, **changed: Any) -> RunSettings:
    plain: dict[str, Any] = {
        "steps": steps, "lr": 1e-3, "clip_norm": 1.0, "ema_decay": 0.9, "seed": 7,
        "precision": Precision.FP32, "micro_batches": 4, "save_every": 3, "log_every": 2,
    }  # fmt: skip
    return RunSettings(**{**plain, **changed})


def make_trainer(
    out: Path, steps: int, ranks: Ranks, poisoned: int | None = None, **changed: Any
) -> Trainer:
    feed = MadeUpFeed(make_sampler(), ranks, poisoned)
    return Trainer(make_objective(), feed, make_settings(steps, **changed), out, ranks)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(trainer: Trainer) -> str:
    """Of weights, averages and moments, bit for bit, whoever holds them."""
    sums = hashlib.sha256()
    assert trainer.ema is not None
    for name, each in trainer.objective.named_parameters():
        states = trainer.optimizer.state[each]
        moments = [states[key] for key in sorted(states) if isinstance(states[key], Tensor)]
        for tensor in (each.detach(), trainer.ema.averages[name], *moments):
            sums.update(whole(tensor).contiguous().numpy().tobytes())
    return sums.hexdigest()


class Told(Trainer):
    """Prints what every step did; may kill itself, as kill -9 would."""

    kill_at: int | None = None

    def observe(self, result: StepResult, batch: Batch) -> None:
        super().observe(result, batch)
        line = {
            "step": self.done - 1,
            "tokens": batch.bucket.num_tokens,
            "ids": batch.ids.tolist(),
            "losses": result.losses["loss"].tolist(),
            "norm": result.norm.item(),
        }
        print(json.dumps(line), flush=True)
        if self.done == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


KINDS: dict[str, Any] = {
    "parallel": Parallel, "checkpointing": Checkpointing, "optimizer": OptimizerKind,
    "precision": Precision,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--kill-at", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changed: dict[str, Any] = {}
    for each in arguments.set:
        name, value = each.split("=")
        changed[name] = KINDS[name](value) if name in KINDS else json.loads(value)
    with start_ranks("cpu") as ranks:
        feed = MadeUpFeed(make_sampler(), ranks)
        settings = make_settings(arguments.steps, **changed)
        trainer = Told(make_objective(), feed, settings, arguments.out, ranks)
        trainer.kill_at = arguments.kill_at
        trainer.run()
        print(json.dumps({"digest": digest(trainer), "skipped": trainer.skipped.item()}))


if __name__ == "__main__":
    main()
