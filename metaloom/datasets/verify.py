"""Every shard of a data set checked against its index, and what is broken named.

A sample whose bytes are those of the index may still be one that no reader can use, if it was so when it was
indexed: that shows when its members are decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from zlib_ng.zlib_ng import crc32

from metaloom.datasets.decoders import (
    ANY_VOCABULARY,
    DECODING_ERRORS,
    IMAGES,
    finite,
    open_image,
    read_npy,
    read_tokens,
)
from metaloom.datasets.index import INDEX_NAME, Index, ShardEntry, SplitTable, remake_advice
from metaloom.datasets.members import cut_members
from metaloom.datasets.reader import require_class
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


def verify(
    index: Index, *, decode: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """All that is broken, shard by shard; empty if every byte is what was written.

    Of a shard whose digest is wrong the samples are checked one by one; if all are whole, the damage lies
    between them. One shard is held in memory.

    Args:
        decode: also decode every member of every sample, as `check_member` does, and compare `cls` with the
            index; on all cores. What a task expects of a member, such as the shape of an array, is not known
            here.
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
        if content is not None and decode:
            damage += _undecodable(index, number, shard, content)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return damage


def check_member(extension: str, payload: bytes | memoryview) -> None:
    """Returns if a member can be decoded; what its extension ends in says how, and others are not looked at.

    `png`, `jpg`, `jpeg`, `webp`: all pixels, at most MAX_PIXELS of them. `npy`: numbers, finite in float32.
    `tokens.npy`: integers in one row. `json`: JSON.

    Raises:
        one of DECODING_ERRORS: it cannot be.
    """
    last = extension.rpartition(".")[2]
    if last in IMAGES:
        open_image(last, payload).load()
    elif f".{extension}".endswith(".tokens.npy"):
        read_tokens("tokens.npy", payload, vocabulary=ANY_VOCABULARY)
    elif last == "npy":
        finite(read_npy(payload))
    elif last == "json":
        json.loads(bytes(payload))


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
    for table, row, entries in _samples_in(index, number, content):
        reason = _difference(table, row, entries)
        if reason is not None:
            found.append(Damage(shard.name, table.key(row), reason))
    return found or [Damage(shard.name, None, "its bytes differ outside of all samples")]


def _difference(table: SplitTable, row: int, entries: memoryview) -> str | None:
    """How the bytes of a sample differ from what the index has of them; None where they do not."""
    if len(entries) < int(table.length[row]):
        return "is cut off"
    return None if crc32(entries) == int(table.crc32[row]) else "has other bytes"


def _samples_in(index: Index, number: int, content: bytes) -> Iterator[tuple[SplitTable, int, memoryview]]:
    """The samples of a shard: split, row there, and those of its bytes that are there."""
    for table in index.splits.values():
        for row in np.flatnonzero(table.shard == number).tolist():
            start, length = int(table.offset[row]), int(table.length[row])
            yield table, row, memoryview(content)[start : start + length]


def _undecodable(index: Index, number: int, shard: ShardEntry, content: bytes) -> list[Damage]:
    """The samples whose bytes are as the index has them, and which no reader can use."""

    def problem(sample: tuple[SplitTable, int, memoryview]) -> Damage | None:
        table, row, entries = sample
        if _difference(table, row, entries) is not None:
            return None  # named already
        extension = ""
        try:
            members = cut_members(bytes(entries))
            require_class(table, row, members)
            for extension, payload in members.items():
                check_member(extension, payload)
            if index.layout == "episodes" and type(json.loads(bytes(members.get("json", b"{}")))) is not dict:
                extension = "json"
                raise ValueError("the json of a ready episode is an object")
        except DECODING_ERRORS as error:
            where = f" ({extension})" if extension else ""
            return Damage(shard.name, table.key(row), f"cannot be decoded{where}: {error}")
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the interpreter
        found = pool.map(problem, _samples_in(index, number, content))
        return [damage for damage in found if damage is not None]
