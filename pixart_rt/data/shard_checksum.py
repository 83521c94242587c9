"""The checksum of a sample, which its writer stores and its reader compares."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence


def checksum(
    source: int,
    bucket: int,
    original_size: Sequence[int],
    crop: Sequence[float],
    latents: bytes | memoryview,
    prompt_embeds: bytes | memoryview,
) -> int:
    """CRC-32 of a sample: its numbers, then its latents, then its text."""
    facts = struct.pack("<qB2I4f", source, bucket, *original_size, *crop)
    return zlib.crc32(prompt_embeds, zlib.crc32(latents, zlib.crc32(facts)))
