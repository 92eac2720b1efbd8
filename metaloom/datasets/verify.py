"""Every shard of a data set checked against its index, and what is broken named."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from metaloom.datasets.index import INDEX_NAME, Index, ShardEntry, remake_advice
from metaloom.datasets.storage import MissingFile
from metaloom.errors import StreamError

NUM_LOOK_UPS = 16


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


def verify_sizes(index: Index) -> None:
    """Returns if every shard exists with the recorded size; one look-up per shard, nothing is read.

    Raises:
        StreamError: lists all shards that are missing or of another size.
    """
    with ThreadPoolExecutor(NUM_LOOK_UPS) as pool:
        wrong = [line for line in pool.map(lambda shard: _size_problem(index, shard), index.shards) if line]
    if wrong:
        listing = "\n".join(f"  {line}" for line in wrong)
        raise StreamError(
            f"{len(wrong)} of {len(index.shards)} shards of {index.dataset} at {index.url} are not what "
            f"{INDEX_NAME} records:\n{listing}\n{remake_advice(index.dataset, index.url)}"
        )


def _size_problem(index: Index, shard: ShardEntry) -> str | None:
    try:
        size = index.storage.size(shard.name)
    except MissingFile:
        return f"{shard.name}: missing, expected {shard.num_bytes} bytes"
    if size == shard.num_bytes:
        return None
    verb = "truncated" if size < shard.num_bytes else "too long"
    return f"{shard.name}: {verb}, {size} bytes, expected {shard.num_bytes}"


def _read(index: Index, shard: ShardEntry) -> bytes | None:
    """A whole shard as it lies in storage, never from the cache."""
    try:
        return index.storage.read(shard.name)
    except MissingFile:
        return None


def _damage(index: Index, number: int, shard: ShardEntry, content: bytes) -> list[Damage]:
    found = []
    if len(content) != shard.num_bytes:
        verb = "is cut short" if len(content) < shard.num_bytes else "is too long"
        found.append(Damage(shard.name, None, f"{verb}: {len(content)} bytes, expected {shard.num_bytes}"))
    for table in index.splits.values():
        for row in np.flatnonzero(table.shard == number).tolist():
            start, length = int(table.offset[row]), int(table.length[row])
            entries = memoryview(content)[start : start + length]
            if len(entries) < length:
                found.append(Damage(shard.name, table.key(row), "is cut off"))
            elif zlib.crc32(entries) != int(table.crc32[row]):
                found.append(Damage(shard.name, table.key(row), "has other bytes"))
    return found or [Damage(shard.name, None, "its bytes differ outside of all samples")]
