"""Tar shards: written with webdataset, the same bytes for the same samples; read by byte range."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.index import (
    FORMAT,
    INDEX_NAME,
    VERSION,
    ClassEntry,
    Index,
    ShardEntry,
    SplitTable,
    open_filesystem,
    remake_advice,
    shards_digest,
)
from metaloom.errors import StreamError
from metaloom.files import replace_file

_BLOCK = 512  # tar pads every payload to this many bytes
_READ_ATTEMPTS = 3
_RETRY_WAIT_S = 0.2


@dataclass(frozen=True)
class Sample:
    """One sample to write: a key without dots, its members by extension, and integer attributes."""

    key: str
    members: Mapping[str, bytes]
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitSamples:
    """One split to write; every sample has the same members and the same attributes."""

    samples: Iterable[Sample]
    classes: Sequence[ClassEntry | str] = ()
    groups: Sequence[str] = ()


def write_shards(
    directory: str | os.PathLike[str],
    splits: Mapping[str, SplitSamples],
    *,
    dataset: str,
    layout: str,
    source: Mapping[str, Any],
    shard_limit_bytes: int = 16 << 20,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """The index of a data set written to a local directory that exists; same samples, same bytes.

    Shards are called `<split>-00000.tar`; a shard never holds two splits, so that plain
    `webdataset.WebDataset` can read one split. Each file, the index last, appears complete or not at all.

    Args:
        splits: the samples of every split, in the order in which they will lie in the shards.
        source: what the data were made from: versions and options, as JSON values.
        shard_limit_bytes: a new shard is begun when a sample would make this one larger. One shard is held
            in memory.
        progress: called with the number of samples written so far.

    Raises:
        StreamError: the directory cannot be written to.
    """
    try:
        return _write(Path(directory), splits, dataset, layout, source, shard_limit_bytes, progress)
    except OSError as error:
        raise StreamError(
            f"{os.fspath(directory)}: the data set cannot be written: {error}. Choose a directory "
            f"that can be written to and has room."
        ) from error


def _write(
    directory: Path,
    splits: Mapping[str, SplitSamples],
    dataset: str,
    layout: str,
    source: Mapping[str, Any],
    shard_limit_bytes: int,
    progress: Callable[[int], None] | None,
) -> Index:
    shards: list[ShardEntry] = []
    tables: dict[str, Any] = {}
    num_written = 0
    for name, split in splits.items():
        keys: list[str] = []
        shard_of: list[int] = []
        members: dict[str, dict[str, list[int]]] = {}
        attributes: dict[str, list[int]] = {}
        tar: _TarShard | None = None
        num_tars = 0
        try:
            for sample in split.samples:
                if tar is not None and tar.size_with(sample) > shard_limit_bytes:
                    shards.append(tar.commit())
                    tar = None
                if tar is None:
                    tar = _TarShard(directory / f"{name}-{num_tars:05d}.tar")
                    num_tars += 1
                for extension, place in tar.add(sample).items():
                    column = members.setdefault(extension, {"offset": [], "length": [], "crc32": []})
                    for part, value in zip(column.values(), place, strict=True):
                        part += [0] * (len(keys) - len(part)) + [value]
                for attribute, value in sample.attributes.items():
                    attributes.setdefault(attribute, []).append(value)
                keys.append(sample.key)
                shard_of.append(len(shards))
                num_written += 1
                if progress is not None:
                    progress(num_written)
            if tar is not None:
                shards.append(tar.commit())
        except BaseException:
            if tar is not None:
                tar.abandon()
            raise
        for column in members.values():
            for part in column.values():
                part += [0] * (len(keys) - len(part))
        entries = [ClassEntry(c) if isinstance(c, str) else c for c in split.classes]
        tables[name] = {
            "classes": [{"name": c.name, "script": c.script} for c in entries],
            "keys": keys,
            "shard": shard_of,
            "members": members,
            "attributes": attributes,
        }
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": dataset,
        "layout": layout,
        "digest": shards_digest(shards),
        "source": dict(source),
        "shards": [
            {"name": s.name, "bytes": s.num_bytes, "sha256": s.sha256, "num_samples": s.num_samples}
            for s in shards
        ],
        "splits": tables,
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n"
    replace_file(directory / INDEX_NAME, text)
    return Index.load(directory)


class _TarShard:
    """One shard being built in memory, and written as a whole."""

    def __init__(self, path: Path) -> None:
        # Imported here: webdataset brings torch along, which readers of this package must not need.
        from webdataset.writer import TarWriter

        self._path = path
        self._buffer = io.BytesIO()
        # mtime, user and group are fixed so that the same samples give the same bytes.
        self._writer = TarWriter(self._buffer, encoder=False, mtime=0, user="metaloom", group="metaloom")
        self._num_samples = 0

    def size_with(self, sample: Sample) -> int:
        """The size of the payloads and headers so far and of this sample, in bytes."""
        return int(self._writer.tarstream.offset) + sum(
            _BLOCK + _padded(len(m)) for m in sample.members.values()
        )

    def add(self, sample: Sample) -> dict[str, tuple[int, int, int]]:
        """(offset, length, crc32) of every member of the sample, which is now in the shard."""
        if "." in sample.key or not sample.members:
            raise ValueError(f"a sample needs members and a key without dots; this is {sample.key!r}")
        places = {}
        for extension in sorted(sample.members):
            payload = sample.members[extension]
            self._writer.write({"__key__": sample.key, extension: payload})
            offset = int(self._writer.tarstream.offset) - _padded(len(payload))
            places[extension] = (offset, len(payload), zlib.crc32(payload))
        self._num_samples += 1
        return places

    def abandon(self) -> None:
        """Closes the shard; nothing of it is on disk."""
        self._writer.close()

    def commit(self) -> ShardEntry:
        """The shard's entry; its file is now complete on disk."""
        self._writer.close()
        content = self._buffer.getvalue()
        replace_file(self._path, content)
        return ShardEntry(
            self._path.name, len(content), hashlib.sha256(content).hexdigest(), self._num_samples
        )


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


class ShardReader:
    """Members of samples, read by byte range from any fsspec URL and checked against their crc32.

    Decoded samples are kept in a least-recently-used cache. A reader may be used by several threads, and may
    be pickled or carried over a fork: the filesystem is opened anew in every process, since fsspec's
    network clients do not survive a fork. To keep whole shards of a remote data set on local disk, load
    the index by a chained URL such as `filecache::s3://bucket/glyphs`.

    Args:
        cache_limit_bytes: the most that decoded samples may take in memory; 0 keeps none.
    """

    def __init__(self, index: Index, *, cache_limit_bytes: int = 256 << 20) -> None:
        self.index = index
        self.cache_limit_bytes = cache_limit_bytes
        self._cache: OrderedDict[tuple[str, int, str], NDArray[Any]] = OrderedDict()
        self._cached_bytes = 0
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._root = ""

    def __reduce__(self) -> tuple[Callable[..., ShardReader], tuple[Index, int]]:
        return _reader, (self.index, self.cache_limit_bytes)

    def read(self, split: str, number: int, member: str) -> bytes:
        """The payload of one member of sample `number` of a split.

        An error of the network or disk is retried; a short or wrong payload is not.

        Raises:
            StreamError: the shard is missing, too short or damaged; names shard and key.
        """
        table = self.index.split(split)
        place = self._place(table, member)
        start, length = int(place.offset[number]), int(place.length[number])
        shard = self.index.shards[int(table.shard[number])]
        sample = f"sample {table.keys[number]!r} ({member}, bytes {start} to {start + length})"
        payload = self._fetch(shard, start, length, sample)
        advice = remake_advice(self.index.dataset, self.index.url)
        if len(payload) != length:
            raise StreamError(
                f"{self.index.url}/{shard.name}: {sample} has {len(payload)} bytes instead of {length}: the "
                f"shard is truncated. {advice}"
            )
        if zlib.crc32(payload) != int(place.crc32[number]):
            raise StreamError(
                f"{self.index.url}/{shard.name}: {sample} has crc32 {zlib.crc32(payload):08x} instead of "
                f"{int(place.crc32[number]):08x}: the shard is damaged. {advice}"
            )
        return payload

    def array(
        self, split: str, number: int, member: str, decode: Callable[[bytes], NDArray[Any]]
    ) -> NDArray[Any]:
        """`decode(payload)` as a read-only array, from the cache if it is there.

        Always call with one `decode` per member.

        Raises:
            StreamError: as `read`; or the payload cannot be decoded.
        """
        place = (split, number, member)
        self._renew_after_fork()
        with self._lock:
            cached = self._cache.get(place)
            if cached is not None:
                self._cache.move_to_end(place)
                return cached
        payload = self.read(split, number, member)
        try:
            array = decode(payload)
        except (ValueError, OSError, SyntaxError) as error:  # Pillow reports broken PNG data by all three
            key = self.index.split(split).keys[number]
            raise StreamError(f"{self.index.url}: sample {key!r} has a bad {member}: {error}") from error
        array.flags.writeable = False
        with self._lock:
            if place not in self._cache and array.nbytes <= self.cache_limit_bytes:
                self._cache[place] = array
                self._cached_bytes += array.nbytes
                while self._cached_bytes > self.cache_limit_bytes:
                    self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return array

    @property
    def cached_bytes(self) -> int:
        """What the cached samples take now."""
        return self._cached_bytes

    def _place(self, table: SplitTable, member: str) -> Any:
        if member not in table.members:
            raise StreamError(
                f"samples of split {table.name!r} at {self.index.url} have no {member!r}; they have "
                f"{', '.join(table.members)}."
            )
        return table.members[member]

    def _fetch(self, shard: ShardEntry, start: int, length: int, sample: str) -> bytes:
        self._renew_after_fork()
        for attempt in range(1, _READ_ATTEMPTS + 1):
            try:
                if self._filesystem is None:
                    self._filesystem, self._root = open_filesystem(self.index.url)
                path = f"{self._root}/{shard.name}"
                return bytes(self._filesystem.cat_file(path, start=start, end=start + length))
            except FileNotFoundError as error:
                raise StreamError(
                    f"{self.index.url}/{shard.name} is missing; {sample} lies there. "
                    f"{remake_advice(self.index.dataset, self.index.url)}"
                ) from error
            except OSError as error:
                if attempt == _READ_ATTEMPTS:
                    raise StreamError(
                        f"{self.index.url}/{shard.name}: {sample} could not be read in {attempt} "
                        f"attempts: {error}"
                    ) from error
                time.sleep(_RETRY_WAIT_S * 4 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _renew_after_fork(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._filesystem = None
            self._lock = threading.Lock()


def _reader(index: Index, cache_limit_bytes: int) -> ShardReader:
    return ShardReader(index, cache_limit_bytes=cache_limit_bytes)


def bytes_array(payload: bytes) -> NDArray[np.uint8]:
    """The payload as uint8, [its length]."""
    return np.frombuffer(payload, dtype=np.uint8)
