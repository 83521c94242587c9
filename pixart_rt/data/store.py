"""Reading a feature store: any sample by its global id, straight from mapped files.

Global ids count the samples from 0 in the order of the images' metadata, without what was skipped.
Neither Parquet nor its library is used here: index.npy says where each sample's bytes lie.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.buckets import VAE_SCALE_FACTOR, Bucket
from pixart_rt.data.batch import Batch, draw_noise
from pixart_rt.data.loader import identity_of
from pixart_rt.data.manifest import (
    CLASSES,
    EMPTY_PROMPT,
    INDEX,
    LABELS,
    ROW,
    StoreManifest,
    shard_name,
)
from pixart_rt.data.sample import bfloat16_from_bytes, pad_text
from pixart_rt.data.shard_checksum import checksum
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import read_json

OPEN_SHARDS = 256  # mapped at a time; each holds a file open, of which systems allow 1024

REMEDY = "delete that file and run the `pixart-rt data extract` that made the store again"


class FeatureStore:
    """A complete store. `store.bucket_of` is what a bucket sampler needs: [num_samples] uint8.

    verify: check every sample's checksum when it is read (its bytes are read anyway). Raises
    DataError for a folder that is no complete store. May be used by DataLoader workers.
    """

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        self.path, self.verify = Path(path), verify
        self.manifest = StoreManifest.read(self.path)
        if not self.manifest.complete:
            raise DataError(
                f"{self.path} is not finished: run the `pixart-rt data extract` that began it "
                "again, it resumes where it stopped"
            )
        self.buckets: tuple[Bucket, ...] = self.manifest.bucket_table
        self._rows = self._read_index()
        self._check_shards()
        self.labels = self._read_labels()
        self._mapped: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which maps the files itself."""
        return {**self.__dict__, "_rows": None, "_mapped": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._read_index()

    @property
    def identity(self) -> str:
        """Changes with the pictures and the encoders."""
        return identity_of(self.manifest.identity)

    @property
    def bucket_of(self) -> npt.NDArray[np.uint8]:
        """The bucket of every sample, an index into `buckets`: [num_samples]."""
        return np.ascontiguousarray(self._rows["bucket"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label; none in a store of captions. Raises DataError."""
        if not self.manifest.num_classes:
            return ()
        path = self.path / CLASSES
        try:
            names = tuple(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
        if len(names) != self.manifest.num_classes:
            raise DataError(f"{path} names {len(names)} classes of "
                            f"{self.manifest.num_classes}; {REMEDY}")  # fmt: skip
        return names

    @property
    def num_tokens(self) -> npt.NDArray[np.uint16]:
        """Text tokens of every sample: [num_samples]."""
        return np.ascontiguousarray(self._rows["num_tokens"])

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """The line of the metadata, from 0, that every sample is of: [num_samples]."""
        return np.ascontiguousarray(self._rows["source"])

    @property
    def empty_prompt(self) -> Tensor:
        """T5(""), the text of a dropped caption: [n, E] bfloat16."""
        path = self.path / EMPTY_PROMPT
        try:
            embeds = load_file(path)["prompt_embeds"]
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
        if embeds.dim() != 2 or embeds.shape[1] != self.manifest.text_width or not len(embeds):
            raise DataError(f"{path} holds {list(embeds.shape)}, not the empty prompt; {REMEDY}")
        return embeds

    def moments(self, sample: int) -> Tensor:
        """The VAE's means and deviations of a sample, unscaled: [2, C, h, w] float16."""
        return self._read(sample)[0]

    def text(self, sample: int) -> Tensor:
        """The text features of a sample without padding: [n, E] bfloat16."""
        return self._read(sample)[1]

    def original_size(self, sample: int) -> tuple[int, int]:
        """Height and width of the picture in its file."""
        height, width = self._row(sample)["original_size"]
        return int(height), int(width)

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Batch:
        """The samples of a step, all of one bucket. Raises DataError for damaged bytes."""
        rows = self._rows_of(ids)
        bucket = self.buckets[int(rows["bucket"][0])]
        read = [self._read(int(sample)) for sample in ids]
        moments = torch.stack([latents for latents, _ in read]).float()
        noise = draw_noise(seed, step, [int(sample) for sample in ids], moments.shape[2:])
        # Of classes all texts are the empty prompt: a token, not a megabyte of padding for XL.
        padded = self.manifest.max_text_tokens if self.labels is None else len(read[0][1])
        embeds, mask = pad_text([text for _, text in read], padded)
        return Batch(
            ids=torch.tensor([int(sample) for sample in ids]),
            latents=(moments[:, 0] + moments[:, 1] * noise) * self.manifest.scaling_factor,
            prompt_embeds=embeds,
            prompt_mask=mask,
            original_size=torch.from_numpy(rows["original_size"].astype(np.float32)),
            aspect_ratio=torch.full((len(ids), 1), bucket.ratio),
            bucket=bucket,
            labels=None if self.labels is None else torch.from_numpy(self.labels[np.asarray(ids)]),
        )

    def finish(self, loaded: Batch) -> Batch:
        """Nothing is left to do; a source that encodes on the fly does it here."""
        return loaded

    def damaged(self) -> list[int]:
        """The ids of all samples whose bytes are not what was written."""
        verify, self.verify = self.verify, True
        try:
            return [sample for sample in range(len(self)) if not self._is_sound(sample)]
        finally:
            self.verify = verify

    def _is_sound(self, sample: int) -> bool:
        try:
            self._read(sample)
        except DataError:
            return False
        return True

    def _read_index(self) -> npt.NDArray[np.void]:
        path = self.path / INDEX
        try:
            rows: npt.NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header is parsed as Python, which raises anything
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
        known = rows.dtype == ROW and rows.shape == (self.manifest.num_samples,)
        if known and len(rows):
            known = int(rows["bucket"].max()) < len(self.buckets) and (
                int(rows["num_tokens"].max()) <= self.manifest.max_text_tokens
            )
        if not known:
            raise DataError(f"{path} is not the index of this store; {REMEDY}")
        return rows

    def _read_labels(self) -> npt.NDArray[np.int64] | None:
        """The class of every sample [num_samples], or None in a store of captions."""
        if not self.manifest.num_classes:
            return None
        path = self.path / LABELS
        try:
            labels: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
        except Exception as error:  # as for the index
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
        known = labels.dtype == np.int64 and labels.shape == (len(self),)
        if not known or labels.min() < 0 or labels.max() >= self.manifest.num_classes:
            raise DataError(f"{path} does not hold the labels of this store; {REMEDY}")
        return labels

    def _check_shards(self) -> None:
        """A missing shard is an error now, not hours into a run."""
        present = set(os.listdir(self.path))
        names = [shard_name(number) for number in range(len(self.manifest.shards))]
        missing = [name for name in names if name not in present]
        if missing:
            raise DataError(
                f"{self.path} lacks {len(missing)} of its shards, first {missing[0]}; run the "
                "`pixart-rt data extract` that made it again"
            )

    def _row(self, sample: int) -> np.void:
        if not 0 <= sample < len(self):
            raise ConfigError(f"sample {sample} was requested; {self.path} has {len(self)} samples")
        row: np.void = self._rows[sample]
        return row

    def _rows_of(self, ids: Sequence[int]) -> npt.NDArray[np.void]:
        """The index rows of a batch: [B] of ROW."""
        if not len(ids):
            raise ConfigError("a batch of no samples was requested")
        rows = np.array([self._row(int(sample)) for sample in ids], ROW)
        if len(np.unique(rows["bucket"])) != 1:
            raise ConfigError(
                f"a batch is of one bucket; samples {list(ids)[:8]} are of buckets "
                f"{np.unique(rows['bucket']).tolist()}"
            )
        return rows

    def _read(self, sample: int) -> tuple[Tensor, Tensor]:
        """(moments [2, C, h, w] float16, text [n, E] bfloat16), copied out of the file."""
        row, manifest = self._row(sample), self.manifest
        bucket = self.buckets[row["bucket"]]
        shape = (
            2,
            manifest.latent_channels,
            bucket.height // VAE_SCALE_FACTOR,
            bucket.width // VAE_SCALE_FACTOR,
        )
        latents = self._bytes(row, "latents_at", 2 * int(np.prod(shape)), sample)
        text_bytes = 2 * int(row["num_tokens"]) * manifest.text_width
        text = self._bytes(row, "text_at", text_bytes, sample)
        if self.verify and row["checksum"] != checksum(
            int(row["source"]), int(row["bucket"]), row["original_size"], row["crop"], latents, text
        ):
            raise DataError(
                f"sample {sample} in {self._shard_path(row)} is damaged (checksum); {REMEDY}"
            )
        moments = np.frombuffer(latents, "<f2").astype(np.float16).reshape(shape)
        return torch.from_numpy(moments), bfloat16_from_bytes(text, manifest.text_width)

    def _bytes(self, row: np.void, field: str, length: int, sample: int) -> memoryview:
        mapped, start = self._map(row), int(row[field])
        if start + length > len(mapped):
            raise DataError(
                f"sample {sample} lies beyond the end of {self._shard_path(row)}; {REMEDY}"
            )
        return memoryview(mapped)[start : start + length]

    def _map(self, row: np.void) -> mmap.mmap:
        number = int(row["shard"])
        if number not in self._mapped:
            try:
                with self._shard_path(row).open("rb") as file:
                    self._mapped[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (FileNotFoundError, ValueError) as error:  # ValueError: an empty file
                raise DataError(f"{self._shard_path(row)} is missing or empty; {REMEDY}") from error
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)  # closed when its last view is gone
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _shard_path(self, row: np.void) -> Path:
        return self.path / shard_name(int(row["shard"]))
