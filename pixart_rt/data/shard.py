"""One shard of a feature store: a Parquet file, and where in it each sample's bytes lie.

Features are stored plain and uncompressed, so a sample's latents and text are each one run of bytes
in the file. Their offsets are found while the shard is written and kept in the file's own metadata
(`pixart_rt.rows`), with the images that were skipped (`pixart_rt.skipped`): a shard is whole by
itself, any Parquet reader can read it, and the trainer reads one sample without decoding others.
"""

from __future__ import annotations

import base64
import io
import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_rt.data.manifest import ROW
from pixart_rt.data.shard_checksum import checksum
from pixart_rt.errors import DataError
from pixart_rt.files import parse_json

ROWS, SKIPPED = b"pixart_rt.rows", b"pixart_rt.skipped"
ROW_GROUP = 64  # samples decoded together by a Parquet reader: tens of megabytes
_PROBE = 64  # bytes of a value that are searched for; the rest is compared

SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("file_name", pa.string()),
            ("source", pa.int64()),
            ("caption", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_tokens_cut", pa.int32()),
            ("bucket", pa.uint8()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("original_height", pa.int32()),
            ("original_width", pa.int32()),
            ("crop_top", pa.float32()),
            ("crop_left", pa.float32()),
            ("crop_height", pa.float32()),
            ("crop_width", pa.float32()),
            ("latents", pa.binary()),
            ("prompt_embeds", pa.binary()),
            ("checksum", pa.uint32()),
        )
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One sample as it is written."""

    file_name: str
    source: int  # the image's place in the metadata
    caption: str  # as in the metadata, before cleaning
    num_tokens: int
    num_tokens_cut: int
    bucket: int
    size: tuple[int, int]  # height, width of the bucket in pixels
    original_size: tuple[int, int]
    crop: tuple[float, float, float, float]
    latents: bytes  # [2, C, h, w] float16, little-endian: means, then deviations
    prompt_embeds: bytes  # [num_tokens, E] bfloat16 bit patterns, little-endian


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is not in the store."""

    source: int
    file_name: str | None  # None where the metadata does not name it
    reason: str


def write_shard(path: Path, records: Sequence[Record], skipped: Sequence[Skipped]) -> None:
    """Write a shard to `path` and wait until it is on the disk."""
    rows = np.zeros(len(records), ROW)
    with path.open("wb+") as file:
        with pq.ParquetWriter(
            file, SCHEMA, compression="NONE", use_dictionary=False, write_statistics=False,
            data_page_version="1.0", column_encoding=None,
        ) as writer:  # fmt: skip
            for start in range(0, len(records), ROW_GROUP):
                group = records[start : start + ROW_GROUP]
                begin = file.tell()
                writer.write_table(_table(group), row_group_size=ROW_GROUP)
                file.flush()
                rows[start : start + ROW_GROUP] = _rows(file.fileno(), begin, group)
            listed = json.dumps([[s.source, s.file_name, s.reason] for s in skipped])
            writer.add_key_value_metadata({ROWS: _pack(rows), SKIPPED: listed.encode()})
        file.flush()
        os.fsync(file.fileno())


def read_shard(path: Path) -> tuple[npt.NDArray[np.void], list[Skipped]]:
    """The rows and the skipped images of a shard. Raises DataError if it is damaged."""
    try:
        metadata = pq.read_metadata(path)
        values = metadata.metadata or {}
        packed = np.load(io.BytesIO(base64.b64decode(values[ROWS])), allow_pickle=False)
        if packed.dtype != ROW or len(packed) != metadata.num_rows:
            raise ValueError("its rows do not fit its metadata")
        skipped = [Skipped(*values) for values in parse_json(values[SKIPPED])]
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is no shard that pixart-rt wrote whole ({error}); delete it and run "
            "`pixart-rt data extract` again"
        ) from error
    return packed, skipped


def _table(records: Sequence[Record]) -> pa.Table:
    columns = {
        "file_name": [r.file_name for r in records],
        "source": [r.source for r in records],
        "caption": [r.caption for r in records],
        "num_tokens": [r.num_tokens for r in records],
        "num_tokens_cut": [r.num_tokens_cut for r in records],
        "bucket": [r.bucket for r in records],
        "height": [r.size[0] for r in records],
        "width": [r.size[1] for r in records],
        "original_height": [r.original_size[0] for r in records],
        "original_width": [r.original_size[1] for r in records],
        "latents": [r.latents for r in records],
        "prompt_embeds": [r.prompt_embeds for r in records],
        "checksum": [_checksum_of(r) for r in records],
    }
    for position, name in enumerate(("crop_top", "crop_left", "crop_height", "crop_width")):
        columns[name] = [r.crop[position] for r in records]
    return pa.table(columns, schema=SCHEMA)


def _checksum_of(record: Record) -> int:
    return checksum(
        record.source, record.bucket, record.original_size, record.crop, record.latents,
        record.prompt_embeds,
    )  # fmt: skip


def _rows(descriptor: int, begin: int, records: Sequence[Record]) -> npt.NDArray[np.void]:
    """The index rows of records that were just written at or after byte `begin`."""
    rows = np.zeros(len(records), ROW)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as written:
        latents_at = _offsets(written, begin, [r.latents for r in records])
        text_at = _offsets(written, begin, [r.prompt_embeds for r in records])
    for row, record, latents, text in zip(rows, records, latents_at, text_at, strict=True):
        row["source"], row["bucket"] = record.source, record.bucket
        row["latents_at"], row["text_at"] = latents, text
        row["num_tokens"], row["original_size"] = record.num_tokens, record.original_size
        row["crop"], row["checksum"] = record.crop, _checksum_of(record)
    return rows


def _offsets(written: mmap.mmap, begin: int, values: Sequence[bytes]) -> list[int]:
    """Where each value lies: Parquet writes it plain, after its length in 4 bytes."""
    offsets = []
    for value in values:
        start = struct.pack("<I", len(value)) + value[:_PROBE]
        at = written.find(start, begin)
        while at >= 0 and written[at + 4 : at + 4 + len(value)] != value:
            at = written.find(start, at + 1)
        assert at >= 0, "Parquet stored a value in pieces or changed"
        offsets.append(at + 4)
        begin = at + 4 + len(value)
    return offsets


def _pack(rows: npt.NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return base64.b64encode(buffer.getvalue())
