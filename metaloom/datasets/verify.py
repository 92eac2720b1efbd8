"""Every shard of a data set checked against its index, and what is broken named."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metaloom.datasets.index import Index, ShardEntry, open_filesystem
from metaloom.errors import StreamError


@dataclass(frozen=True)
class Damage:
    """Something that is not what the index records: of one sample, or of a shard where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        sample = "" if self.key is None else f", sample {self.key!r}"
        return f"{self.shard}{sample}: {self.reason}"


def verify(index: Index, *, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """All that is broken, shard by shard; empty if every byte is what was written.

    Of a shard whose digest is wrong the samples are checked one by one; if all are whole, the damage lies
    between them. One shard is held in memory.

    Args:
        progress: called with (shards done, shards in all).

    Raises:
        StreamError: the storage cannot be read; a file that is not there is damage.
    """
    damage: list[Damage] = []
    for number, shard in enumerate(index.shards):
        content = _read(index, shard)
        if content is None:
            damage.append(Damage(shard.name, None, "is missing"))
        elif hashlib.sha256(content).hexdigest() != shard.sha256:
            damage += _damage(index, number, shard, content)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return damage


def _read(index: Index, shard: ShardEntry) -> bytes | None:
    file, root = open_filesystem(index.url)
    try:
        return bytes(file.cat_file(f"{root}/{shard.name}"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StreamError(f"{index.url}/{shard.name} cannot be read: {error}") from error


def _damage(index: Index, number: int, shard: ShardEntry, content: bytes) -> list[Damage]:
    found = []
    if len(content) != shard.num_bytes:
        verb = "is cut short" if len(content) < shard.num_bytes else "is too long"
        found.append(Damage(shard.name, None, f"{verb}: {len(content)} bytes, expected {shard.num_bytes}"))
    for table in index.splits.values():
        for row in np.flatnonzero(table.shard == number):
            for name, place in table.members.items():
                start, length = int(place.offset[row]), int(place.length[row])
                payload = content[start : start + length]
                if len(payload) < length:
                    found.append(Damage(shard.name, table.keys[row], f"its {name} is cut off"))
                elif length and zlib.crc32(payload) != int(place.crc32[row]):
                    found.append(Damage(shard.name, table.keys[row], f"its {name} has other bytes"))
    return found or [Damage(shard.name, None, "its bytes differ outside of all samples")]
