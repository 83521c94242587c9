"""Drawn scenes as latents, encoded once and kept on disk: scene i is a function of (seed, i).

    OUT/<name>/<height>x<width>-00003.npy     [scenes, 4, height / 8, width / 8] float16

Latents are posterior means times the VAE's scaling factor. A file holds the next CHUNK_PIXELS of
one bucket's scenes; it is whole or absent, so encoding that was stopped resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.bundle import sha256
from pixart_rt.errors import ConfigError
from pixart_rt.files import replacing
from pixart_rt.model.vae import VaeEncoder, read_vae
from pixart_rt.training.tiny.kinds import Scenes
from pixart_rt.training.tiny.scenes import Scene, draw, one_thing, place, random_scene

CHUNK_PIXELS = 64 * 256 * 256  # of a file
BATCH_PIXELS = 8 * 256 * 256  # encoded at once
SCENE, PLACE, BUCKET = 0, 1, 2  # what random numbers are for
FORMAT = 1  # raise it when scenes or their latents change
VAE_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSet:
    """A number of scenes, each in one of the buckets."""

    kind: Scenes
    count: int
    buckets: tuple[Bucket, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not self.buckets or self.seed < 0:
            raise ConfigError(
                f"{self.count} scenes of {len(self.buckets)} sizes with seed {self.seed} were "
                "asked; use at least one, and a seed that is not negative"
            )

    def bucket_of(self) -> npt.NDArray[np.uint8]:
        """[count], indices into `buckets`, each as likely."""
        rng = np.random.default_rng([self.seed, BUCKET])
        return rng.integers(len(self.buckets), size=self.count).astype(np.uint8)

    def scene(self, number: int) -> Scene:
        """Scene `number`, of the training side of the split."""
        rng = np.random.default_rng([self.seed, SCENE, number])
        if self.kind is Scenes.CLASSES:
            return one_thing(rng, held_out=False)
        return random_scene(rng, held_out=False)

    def image(self, number: int, bucket: Bucket) -> npt.NDArray[np.float32]:
        """[height, width, 3] in 0..1."""
        rng = np.random.default_rng([self.seed, PLACE, number])
        scene, height, width = self.scene(number), bucket.height, bucket.width
        return draw(scene, place(scene, height, width, rng), height, width)

    def identity(self, vae: Path) -> str:
        """Changes when the latents do. Captions do not enter: dense and sparse ones share files."""
        values = asdict(self) | {"classes": self.kind is Scenes.CLASSES, "format": FORMAT}
        del values["kind"]
        values["vae"] = sha256(vae / VAE_FILE)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Latents:
    """The latents of a SceneSet under `root`, those of the VAE in the folder `vae`."""

    def __init__(self, scenes: SceneSet, root: Path, vae: Path) -> None:
        self.scenes, self.vae = scenes, Path(vae)
        self.bucket_of = scenes.bucket_of()
        first = scenes.buckets[0]
        name = f"{scenes.count}-of-{first.num_tokens}-tokens-{scenes.identity(self.vae)}"
        self.folder = Path(root) / name
        self._open: dict[Path, npt.NDArray[np.float16]] = {}

    @cached_property
    def _place_of(self) -> npt.NDArray[np.int64]:
        """[count]: the place of a scene among those of its bucket."""
        places = np.empty(len(self.bucket_of), np.int64)
        for bucket in range(len(self.scenes.buckets)):
            mine = np.flatnonzero(self.bucket_of == bucket)
            places[mine] = np.arange(len(mine))
        return places

    def chunk_size(self, bucket: Bucket) -> int:
        """Scenes in a file."""
        return max(CHUNK_PIXELS // (bucket.height * bucket.width), 1)

    def chunks(self) -> Iterator[tuple[Path, Bucket, npt.NDArray[np.int64]]]:
        """Every file with its bucket and scenes."""
        for index, bucket in enumerate(self.scenes.buckets):
            mine, size = np.flatnonzero(self.bucket_of == index), self.chunk_size(bucket)
            for number, start in enumerate(range(0, len(mine), size)):
                yield self._path(bucket, number), bucket, mine[start : start + size]

    def encode(
        self,
        device: torch.device,
        rank: int = 0,
        num_ranks: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write what is missing of this rank's share of the files. Other ranks write the others."""
        mine = list(self.chunks())[rank::num_ranks]
        missing = [each for each in mine if not each[0].exists()]
        if not missing:
            return
        encoder = VaeEncoder(read_vae(self.vae)).to(device)
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for done, (path, bucket, numbers) in enumerate(missing):
            if progress is not None:
                progress(done, len(missing))
            found = self._encoded(encoder, bucket, numbers, device)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, found)

    @torch.no_grad()
    def _encoded(
        self,
        encoder: VaeEncoder,
        bucket: Bucket,
        numbers: npt.NDArray[np.int64],
        device: torch.device,
    ) -> npt.NDArray[np.float16]:
        """[scenes, 4, h, w]; products in bfloat16, which halves the time (two decimals are kept,
        far below the posterior's own deviation of 0.14)."""
        batch = max(BATCH_PIXELS // (bucket.height * bucket.width), 1)
        parts = []
        for start in range(0, len(numbers), batch):
            images = [self.scenes.image(int(each), bucket) for each in numbers[start:][:batch]]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                parts.append(encoder(pixels * 2 - 1).float().cpu())
        return torch.cat(parts).half().numpy()

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        """[B, 4, h, w] float32 of scenes of one bucket."""
        found = {int(self.bucket_of[each]) for each in numbers}
        if len(found) != 1:
            raise ConfigError(f"a batch is of one bucket, these scenes are of {sorted(found)}")
        bucket = self.scenes.buckets[found.pop()]
        size = self.chunk_size(bucket)
        rows = []
        for each in numbers:
            chunk, row = divmod(int(self._place_of[each]), size)
            rows.append(self._file(self._path(bucket, chunk))[row])
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def _path(self, bucket: Bucket, chunk: int) -> Path:
        return self.folder / f"{bucket.height}x{bucket.width}-{chunk:05d}.npy"

    def _file(self, path: Path) -> npt.NDArray[np.float16]:
        if path not in self._open:
            self._open[path] = np.load(path, mmap_mode="r")
        return self._open[path]
