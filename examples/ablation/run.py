"""Trains the arms one after the other and scores each on held-out captions while it learns.

    DIR/plan.json            arms.Plan
    DIR/data/                scenes of each kind and their features (tiny/data.py)
    DIR/<arm>/               trainer.py's files; scores/step-00000100.json
    DIR/dit.pt               what the arms from a DiT start from

Stopped anywhere, the same call resumes: an arm from its newest checkpoint, and a score that is
missing is taken from the checkpoint of its step.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from examples.ablation.adaln import AdaLNObjective, AdaLNTransformer, from_dit
from examples.ablation.arms import Arm, Plan
from examples.tiny.data import Scenes, SceneSet, open_encoder, scene_store
from examples.tiny.scenes import SHAPES, Scene, caption, random_scene
from examples.tiny.scorer import score
from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.dit import DiTCheckpoint, read_dit, write_dit
from pixart_rt.checkpoints.transformer import load_transformer
from pixart_rt.config import ModelConfig, Precision, SamplingConfig
from pixart_rt.data.batch import Batch
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.loader import Batches
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import ConfigError
from pixart_rt.files import replacing
from pixart_rt.model.dit import DiT, DiTConfig, initialize_dit
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.denoising import ClassObjective, Objective, TextObjective
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.progress import Progress, silent
from pixart_rt.training.reparameterize import reparameterize
from pixart_rt.training.reparameterize_settings import TextStart
from pixart_rt.training.run_settings import RunSettings
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.sampler import BucketSampler
from pixart_rt.training.trainer import Trainer
from pixart_rt.training.validation import Validation, ValidationSettings
from pixart_rt.training.weight_init import from_scratch

DROPOUT = 0.1  # of captions and labels
WARMUP = 0.05  # share of S
TIMED = 3  # steps, after one that is not counted
CAPTIONS = 4  # what the random numbers of held-out captions are for
UNSEEN, UNSEEN_SEED = 128, 1  # scenes of the loss, which are not those of seed 0
CAPTION_CHANNELS, MAX_TEXT_TOKENS = 128, 120  # of the shipped text encoder


@dataclass(frozen=True, slots=True)
class Point:
    """An arm after some of its steps: its loss on scenes that no arm trains on, the same noise for
    all, with captions that name everything; and shares of the objects that captions ask for."""

    step: int
    loss: float
    right: float  # colour and shape
    placed: float  # and at their place
    exact: float  # share of images: all placed, nothing else, the right background


@dataclass(frozen=True, slots=True)
class Curve:
    """An arm: (step, mean loss since the step before), scores, seconds a step."""

    losses: list[tuple[int, float]]
    points: list[Point]
    seconds_per_step: float


class Ablation:
    """The arms of a plan in a folder, on one process."""

    def __init__(self, plan: Plan, out: Path, ranks: Ranks, progress: Progress = silent) -> None:
        if ranks.num_ranks > 1:
            raise ConfigError("the ablation runs on one process; start it without torchrun")
        self.plan, self.out, self.ranks, self.progress = plan, Path(out), ranks, progress
        self._stores: dict[Scenes, FeatureStore] = {}
        side = plan.resolution
        self.bucket = Bucket(ratio=1.0, height=side, width=side)
        self.config = ModelConfig(
            num_layers=plan.num_layers,
            num_heads=plan.num_heads,
            caption_channels=CAPTION_CHANNELS,
            max_text_tokens=MAX_TEXT_TOKENS,
            sample_size=side // 8,
            interpolation_scale=1.0,
            micro_conditioning=False,
        )

    def run(self) -> dict[Arm, Curve]:
        """Train what is not trained yet; what all arms did."""
        for number, arm in enumerate(Arm):
            self.progress(f"training {arm}", number, len(Arm))
            trainer = self.trainer(arm)
            trainer.run()
            if arm is Arm.DIT:
                self._keep_dit(trainer)
            else:
                self._fill_scores(arm, trainer)
        return {arm: self.curve(arm) for arm in Arm}

    def trainer(self, arm: Arm) -> Trainer:
        """Of one arm; scores are taken as it goes."""
        plan, source = self.plan, self.source(arm)
        sampler = BucketSampler(
            source.bucket_of,
            [self.bucket.num_tokens],
            token_budget=plan.batch * self.bucket.num_tokens,
            seed=plan.seed,
        )
        settings = RunSettings(
            steps=arm.length * plan.steps,
            lr=plan.lr,
            warmup=Warmup(steps=max(WARMUP * plan.steps, 1)),
            optimizer=plan.optimizer,
            ema_decay=plan.ema_decay,
            precision=Precision(plan.precision),
            seed=plan.seed,
            log_every=self.log_every,
            save_every=plan.score_every,
            keep=arm.length * plan.points,
            validate_every=None if arm is Arm.DIT else plan.score_every,
        )
        return Trainer(
            self.objective(arm, source),
            Batches(source, sampler.ids, seed=plan.seed),
            settings,
            self.out / arm,
            self.ranks,
            identity={"arm": str(arm), "plan": plan.to_dict(), "data": source.identity},
            validation=lambda weights, step: self._score(arm, weights, step),
        )

    @property
    def log_every(self) -> int:
        return max(self.plan.score_every // 5, 1)

    def source(self, arm: Arm) -> FeatureStore:
        """The samples of an arm; those of the plan that are missing are made."""
        if arm.data not in self._stores:
            self._stores[arm.data] = self._store(str(arm.data), arm.data, self.plan.scenes, 0)
        return self._stores[arm.data]

    def _store(self, name: str, kind: Scenes, count: int, seed: int) -> FeatureStore:
        scenes = SceneSet(
            kind=kind, count=count, resolution=self.plan.resolution, square=True, seed=seed
        )
        return scene_store(scenes, self.out / "data", name, self._encoder, self.progress)

    @cached_property
    def _encoder(self) -> FeatureEncoder:
        return open_encoder(self.ranks.device)

    def objective(self, arm: Arm, source: FeatureStore) -> Objective:
        """From the weights that the arm starts from."""
        diffusion, shift = GaussianDiffusion(), self.plan.timestep_shift
        if arm is Arm.DIT:
            config = DiTConfig(
                num_classes=len(SHAPES),
                num_layers=self.config.num_layers,
                num_heads=self.config.num_heads,
                head_dim=self.config.head_dim,
                sample_size=self.config.sample_size,
            )
            dit = initialize_dit(DiT(config), torch.Generator().manual_seed(self.plan.seed))
            return ClassObjective(dit, diffusion, DROPOUT, timestep_shift=shift)
        model, null = self.model(arm), self._null(source)
        if isinstance(model, AdaLNTransformer):
            return AdaLNObjective(model, diffusion, null, DROPOUT, timestep_shift=shift)
        return TextObjective(model, diffusion, null, DROPOUT, timestep_shift=shift)

    def model(self, arm: Arm) -> PixArtTransformer | AdaLNTransformer:
        """A text arm's, as it starts."""
        if arm is Arm.SCRATCH:
            return load_transformer(from_scratch(self.config, self.plan.seed), torch.float32)
        dit = read_dit(self.out / "dit.pt", heads=self.config.num_heads)
        if arm is Arm.ADALN:
            return from_dit(dit, self.config, self.plan.seed)
        start = TextStart(
            caption_channels=CAPTION_CHANNELS, max_text_tokens=MAX_TEXT_TOKENS, seed=self.plan.seed
        )
        return load_transformer(reparameterize(dit, start), torch.float32)

    def curve(self, arm: Arm) -> Curve:
        """What the files of an arm that has run say."""
        lines = [
            json.loads(each)
            for each in (self.out / arm / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        every = self.log_every  # a checkpoint's line is the mean of few steps
        losses = [(int(line["step"]), float(line["loss"])) for line in lines
                  if line["step"] % every == 0]  # fmt: skip
        scores = sorted((self.out / arm / "scores").glob("step-*.json"))
        points = [Point(**json.loads(path.read_text(encoding="utf-8"))) for path in scores]
        seconds = sorted(
            self.plan.batch / line["images_per_second"] for line in lines if line["step"] > 1
        )
        return Curve(losses, points, seconds[len(seconds) // 2])

    def some_batch(self) -> Batch:
        """A batch of captioned scenes of the plan."""
        numbers = np.arange(self.plan.batch) % self.plan.scenes
        return self.source(Arm.SCRATCH).load(numbers.tolist(), seed=self.plan.seed, step=0)

    @cached_property
    def asked(self) -> list[tuple[Scene, str]]:
        """Held-out scenes and one phrasing of each; the same for every arm."""
        rng = np.random.default_rng([self.plan.seed, CAPTIONS])
        scenes = [random_scene(rng, held_out=True) for _ in range(self.plan.captions)]
        return [(scene, caption(scene, rng)) for scene in scenes]

    @cached_property
    def _unseen(self) -> FeatureStore:
        return self._store("unseen", Scenes.DENSE, UNSEEN, UNSEEN_SEED)

    @cached_property
    def _drawer(self) -> Validation:
        sampling = SamplingConfig(
            num_inference_steps=self.plan.sampling_steps, guidance_scale=self.plan.guidance_scale
        )
        settings = ValidationSettings(
            prompts=tuple(text for _, text in self.asked),
            seed=self.plan.seed,
            sampling=sampling,
            batch=16,
        )
        return Validation("tiny", self.config, settings, self.ranks.device, bucket=self.bucket)

    def _score(self, arm: Arm, weights: dict[str, Tensor], step: int) -> None:
        objective = cast(TextObjective, self.objective(arm, self._unseen)).to(self.ranks.device)
        objective.load_state_dict(weights)
        images = self._drawer.images(objective.model).permute(0, 2, 3, 1).numpy()
        found = [score(image, scene) for image, (scene, _) in zip(images, self.asked, strict=True)]
        asked = sum(each.asked for each in found)
        point = Point(
            step,
            self._unseen_loss(objective),
            sum(each.right for each in found) / asked,
            sum(each.placed for each in found) / asked,
            sum(each.exact for each in found) / len(found),
        )
        with replacing(self._score_path(arm, step)) as new:
            new.write_text(json.dumps(asdict(point)) + "\n", encoding="utf-8")

    @torch.no_grad()
    def _unseen_loss(self, objective: TextObjective) -> float:
        losses = []
        for start in range(0, UNSEEN, self.plan.batch):
            numbers = list(range(start, min(start + self.plan.batch, UNSEEN)))
            batch = self._unseen.load(numbers, seed=self.plan.seed, step=0)
            draws = draw(self.plan.seed, 0, batch).to(self.ranks.device)
            losses.append(objective(batch.to(self.ranks.device), draws)["loss"].cpu())
        return torch.cat(losses).mean().item()

    def _score_path(self, arm: Arm, step: int) -> Path:
        return self.out / arm / "scores" / f"step-{step:08d}.json"

    def _fill_scores(self, arm: Arm, trainer: Trainer) -> None:
        """Of steps whose checkpoint was written and whose score was not, before a kill."""
        every = self.plan.score_every
        for step in range(every, trainer.settings.steps + 1, every):
            if not self._score_path(arm, step).exists():
                trainer.resume(step)
                self._score(arm, trainer.weights(average=True), step)

    def _keep_dit(self, trainer: Trainer) -> None:
        path = self.out / "dit.pt"
        if path.exists():
            return
        objective = cast(ClassObjective, trainer.objective)
        weights = trainer.weights(average=True)
        state = {name.removeprefix("model."): each for name, each in weights.items()}
        write_dit(DiTCheckpoint(objective.model.config, state, "ablation"), path)

    def _null(self, source: FeatureStore) -> NullText:
        found = source.empty_prompt.float()
        embeds = torch.zeros(MAX_TEXT_TOKENS, CAPTION_CHANNELS)
        embeds[: len(found)] = found
        return NullText(embeds, torch.arange(MAX_TEXT_TOKENS) < len(found))


def seconds_per_step(plan: Plan, out: Path, ranks: Ranks) -> float:
    """Of a text arm on this machine, measured over TIMED steps in a folder that is thrown away."""
    short = replace(plan, steps=TIMED + 1, points=1, num_scenes=plan.batch)
    ablation = Ablation(short, out, ranks)
    trainer = ablation.trainer(Arm.SCRATCH)
    batches = trainer.feed(0, TIMED + 1)
    trainer.step(next(batches))
    start = time.perf_counter()
    for batch in batches:
        trainer.step(batch)
    return (time.perf_counter() - start) / TIMED
