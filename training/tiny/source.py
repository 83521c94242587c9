"""Drawn scenes as a phase trains on them (Source, training/sample_source.py), nothing downloaded.

    source = open_scenes(Scenes.DENSE, 12_000, table, out / "scenes", ranks)
    run_phase(recipe, phase, source, ...)

Latents come from files (latents.py). What a caption says is drawn for (seed, step, scene), so a
scene is told in another way each time; the shipped text encoder reads it.

B scenes, T text tokens, E text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket, buckets
from pixart_rt.bundle import sha256
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.data.batch import Batch
from pixart_rt.errors import DataError
from pixart_rt.model.text_encoder import T5Encoder
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.tiny.kinds import Scenes
from pixart_rt.training.tiny.latents import Latents, SceneSet
from pixart_rt.training.tiny.scenes import SHAPES, caption, only_one

CAPTION_TOKENS = 32  # longer than any caption; padding is masked, so more would change nothing
CAPTION = 3  # what random numbers are for, beside latents.py's
TEXT_FILE = "model.safetensors"


class CaptionEncoder:
    """The shipped tokenizer and T5 on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = str(Path(folder) / "tokenizer" / "spiece.model")
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model)
        encoder: T5Encoder = read_text_encoder(Path(folder) / "text_encoder", torch.float32)
        self.encoder, self.device = encoder.to(device), device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(embeddings [B, T, E] bfloat16, zero at padding; mask [B, T] boolean) on the device."""
        rows = [[*self.pieces.encode(text), self.pieces.eos_id()] for text in texts]
        longest = max(map(len, rows))
        if longest > CAPTION_TOKENS:
            raise DataError(f"a caption has {longest} tokens, more than {CAPTION_TOKENS}")
        ids = torch.zeros(len(rows), CAPTION_TOKENS, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(CAPTION_TOKENS) < lengths[:, None]).to(self.device)
        embeds = self.encoder(ids.to(self.device), mask.to(torch.int64))
        return (embeds * mask[..., None]).to(torch.bfloat16), mask


class SceneSource:
    """The samples of a phase: scenes with labels or captions."""

    def __init__(self, scenes: SceneSet, latents: Latents, encoder: CaptionEncoder) -> None:
        self.scenes, self.latents, self.encoder = scenes, latents, encoder
        embeds, mask = encoder([""])
        self.empty_prompt = embeds[0, mask[0]].cpu()
        text = sha256(TINY / "text_encoder" / TEXT_FILE)
        about = [scenes.kind, scenes.identity(latents.vae), text]
        self.identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.scenes.count

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.scenes.buckets

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        return self.latents.bucket_of

    def feed(self, ids: Callable[[int], npt.NDArray[np.int64]], seed: int) -> SceneFeed:
        """The batches of the scenes that `ids` gives for a step."""
        return SceneFeed(self, ids, seed)

    def batch(self, numbers: Sequence[int], seed: int, step: int) -> Batch:
        """Scenes of one bucket as a batch."""
        count, labels = len(numbers), None
        bucket = self.buckets[int(self.bucket_of[numbers[0]])]
        if self.scenes.kind is Scenes.CLASSES:
            found = [SHAPES.index(self.scenes.scene(each).things[0].shape) for each in numbers]
            labels = torch.tensor(found)
            one = self.empty_prompt[None].expand(count, -1, -1)
            embeds, mask = one, torch.ones(one.shape[:2], dtype=torch.bool)
        else:
            embeds, mask = self.encoder([self.caption(each, seed, step) for each in numbers])
        size = torch.tensor([[bucket.height, bucket.width]], dtype=torch.float32)
        return Batch(
            ids=torch.tensor(numbers),
            latents=self.latents[numbers],
            prompt_embeds=embeds,
            prompt_mask=mask,
            original_size=size.expand(count, 2),
            aspect_ratio=torch.full((count, 1), bucket.ratio),
            bucket=bucket,
            labels=labels,
        )

    def caption(self, number: int, seed: int, step: int) -> str:
        """What is said of a scene at a step."""
        rng = np.random.default_rng([seed, CAPTION, step, number])
        scene = self.scenes.scene(number)
        return caption(only_one(scene, rng) if self.scenes.kind is Scenes.SPARSE else scene, rng)


@dataclass(frozen=True, slots=True)
class SceneFeed:
    """The Feed of a rank."""

    source: SceneSource
    ids: Callable[[int], npt.NDArray[np.int64]]
    seed: int

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            yield self.source.batch(self.ids(step).tolist(), self.seed, step)


def open_scenes(
    kind: Scenes,
    count: int,
    table: Sequence[Bucket],
    root: Path,
    ranks: Ranks,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> SceneSource:
    """Scenes of these sizes, their latents under `root`; what is missing all ranks encode."""
    scenes = SceneSet(kind=kind, count=count, buckets=tuple(table), seed=seed)
    latents = Latents(scenes, root, TINY / "vae")
    latents.encode(ranks.device, ranks.rank, ranks.num_ranks, progress)
    ranks.barrier()
    return SceneSource(scenes, latents, CaptionEncoder(TINY, ranks.device))


def phase_buckets(resolution: int, multi_scale: bool) -> tuple[Bucket, ...]:
    """All aspect ratios of a resolution, or the square alone."""
    table = buckets(resolution)
    return table if multi_scale else tuple(each for each in table if each.height == each.width)
