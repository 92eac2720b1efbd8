"""Tar shards, written with webdataset: the same bytes for the same samples, whoever writes them and when."""

from __future__ import annotations

import array
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from metaloom.datasets.index import (
    ATTRIBUTE,
    FORMAT,
    INDEX_NAME,
    VERSION,
    FileEntry,
    Index,
    ShardEntry,
    columns_name,
    data_digest,
)
from metaloom.datasets.members import BLOCK, BadEntries, padded, split_name
from metaloom.errors import StreamError
from metaloom.files import replace_file


@dataclass(frozen=True)
class Sample:
    """One sample to write: a key without dots, its members by extension, and integer attributes."""

    key: str
    members: Mapping[str, bytes]
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitSamples:
    """One split to write; every sample has the same attributes.

    Attributes:
        samples: in the order in which they will lie in the shards. Of layout `classes`, those of a class next
            to each other: then a class is one stretch of bytes.
        classes: names, which the attribute `class` is a row of.
        groups: names, which the attribute `group` is a row of.
    """

    samples: Iterable[Sample]
    classes: Sequence[str] = ()
    groups: Sequence[str] = ()


def write_shards(
    directory: str | os.PathLike[str],
    splits: Mapping[str, SplitSamples],
    *,
    dataset: str,
    layout: str,
    source: Mapping[str, Any],
    shard_limit_bytes: int = 64 << 20,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """The index of a data set written to a local directory that exists; same samples, same bytes.

    Shards are called `<split>-00000.tar`; a shard never holds two splits, so that plain
    `webdataset.WebDataset` can read one split. Each file, the index last, appears complete or not at all.

    Args:
        splits: the samples of every split.
        source: what the data were made from: versions and options, as JSON values. Asked when all samples are
            written, so what was left out may be added to it until then.
        shard_limit_bytes: a new shard is begun when a sample would make this one larger. One shard is held
            in memory.
        progress: called with the number of samples written so far.

    Raises:
        StreamError: the directory cannot be written to; or a key comes twice in a split.
    """
    try:
        return _write(Path(directory), splits, dataset, layout, source, shard_limit_bytes, progress)
    except OSError as error:
        raise StreamError(
            f"{os.fspath(directory)}: the data set cannot be written: {error}. Choose a directory "
            f"that can be written to and has room."
        ) from error


def write_index(
    directory: Path,
    shards: Sequence[ShardEntry],
    splits: Mapping[str, SplitColumns],
    *,
    dataset: str,
    layout: str,
    source: Mapping[str, Any],
) -> None:
    """Writes the columns of every split, and the index last, to a local directory."""
    tables = {}
    columns = []
    for name, split in splits.items():
        content = split.content()
        entry = FileEntry(columns_name(name), len(content), hashlib.sha256(content).hexdigest())
        replace_file(directory / entry.name, content)
        columns.append(entry)
        tables[name] = {
            "num_samples": split.num_samples,
            "columns": {"name": entry.name, "bytes": entry.num_bytes, "sha256": entry.sha256},
            "members": sorted(split.members),
            "classes": list(split.classes),
            "groups": list(split.groups),
            "cls_holds": split.cls_holds,
        }
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": dataset,
        "layout": layout,
        "digest": data_digest([*shards, *columns]),
        "source": dict(source),
        "shards": [
            {"name": s.name, "bytes": s.num_bytes, "sha256": s.sha256, "num_samples": s.num_samples}
            for s in shards
        ],
        "splits": tables,
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n"
    replace_file(directory / INDEX_NAME, text)


class SplitColumns:
    """The columns of a split, taken in sample by sample, in a few bytes each.

    Args:
        classes, groups: names.
        cls_holds: what the samples' `cls` says, as `SplitTable` has it.
    """

    def __init__(
        self, *, classes: Sequence[str] = (), groups: Sequence[str] = (), cls_holds: str = "row"
    ) -> None:
        self.classes, self.groups, self.cls_holds = tuple(classes), tuple(groups), cls_holds
        self.members: set[str] = set()
        self._shard, self._offset, self._length = array.array("i"), array.array("q"), array.array("q")
        self._crc32, self._key_end, self._keys = array.array("I"), array.array("q"), bytearray()
        self._attributes: dict[str, array.array[int]] = {}

    @property
    def num_samples(self) -> int:
        return len(self._shard)

    def add(
        self,
        key: str,
        *,
        shard: int,
        offset: int,
        length: int,
        crc32: int,
        members: Iterable[str],
        attributes: Mapping[str, int],
    ) -> None:
        """One more sample.

        Args:
            shard: row of the list of shards.
            offset: bytes from the shard's start to the sample's tar entries.
            length: bytes of all of them.
            crc32: of those bytes.
        """
        if self.num_samples and attributes.keys() != self._attributes.keys():
            raise ValueError(
                f"sample {key!r} has the attributes {sorted(attributes)}, those before it "
                f"{sorted(self._attributes)}"
            )
        self._shard.append(shard)
        self._offset.append(offset)
        self._length.append(length)
        self._crc32.append(crc32)
        self._keys += key.encode()
        self._key_end.append(len(self._keys))
        self.members.update(members)
        for name, value in attributes.items():
            self._attributes.setdefault(name, array.array("q")).append(value)

    def renumber(self, attribute: str, numbers: Sequence[int]) -> None:
        """What was n is now `numbers[n]`, in a whole column: names are known when all samples are."""
        if attribute in self._attributes:
            old = np.array(self._attributes[attribute], np.int64)
            self._attributes[attribute] = array.array("q", np.array(numbers, np.int64)[old].tolist())

    def content(self) -> bytes:
        """The columns file: safetensors."""
        from safetensors.numpy import save

        columns: dict[str, NDArray[Any]] = {
            "shard": np.array(self._shard, np.int32),
            "offset": np.array(self._offset, np.int64),
            "length": np.array(self._length, np.int64),
            "crc32": np.array(self._crc32, np.uint32),
            "key_end": np.array(self._key_end, np.int64),
            "keys": np.frombuffer(bytes(self._keys), np.uint8),
        }
        for name, values in self._attributes.items():
            wide = np.array(values, np.int64)
            is_narrow = not len(wide) or (np.abs(wide) < 2**31).all()
            columns[ATTRIBUTE + name] = wide.astype(np.int32) if is_narrow else wide
        return bytes(save(columns))


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
    tables: dict[str, SplitColumns] = {}
    num_written = 0
    for name, split in splits.items():
        columns = tables[name] = SplitColumns(classes=split.classes, groups=split.groups)
        keys: set[bytes] = set()  # of 8 bytes each: millions of keys shall not fill the memory
        tar: _TarShard | None = None
        num_tars = 0
        try:
            for sample in split.samples:
                digest = hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
                if digest in keys:
                    raise StreamError(f"split {name!r}: the key {sample.key!r} comes twice; keys are names.")
                keys.add(digest)
                if tar is not None and tar.size_with(sample) > shard_limit_bytes:
                    shards.append(tar.commit(columns, row=len(shards)))
                    tar = None
                if tar is None:
                    tar = _TarShard(directory / f"{name}-{num_tars:05d}.tar")
                    num_tars += 1
                tar.add(sample)
                num_written += 1
                if progress is not None:
                    progress(num_written)
            if tar is not None:
                shards.append(tar.commit(columns, row=len(shards)))
        except BaseException:
            if tar is not None:
                tar.abandon()
            raise
    write_index(directory, shards, tables, dataset=dataset, layout=layout, source=source)
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
        self._samples: list[tuple[str, tuple[str, ...], Mapping[str, int]]] = []
        self._bounds = [0]  # where each sample starts, and the last one ends

    def size_with(self, sample: Sample) -> int:
        """The size of the payloads and headers so far and of this sample, in bytes."""
        return self._bounds[-1] + sum(BLOCK + padded(len(m)) for m in sample.members.values())

    def add(self, sample: Sample) -> None:
        """The sample is now in the shard."""
        if "." in sample.key or not sample.members:
            raise ValueError(f"a sample needs members and a key without dots; this is {sample.key!r}")
        for extension in sample.members:
            _require_readable(sample.key, extension)
        for extension in sorted(sample.members):
            self._writer.write({"__key__": sample.key, extension: sample.members[extension]})
        self._samples.append((sample.key, tuple(sample.members), sample.attributes))
        self._bounds.append(int(self._writer.tarstream.offset))

    def abandon(self) -> None:
        """Closes the shard; nothing of it is on disk."""
        self._writer.close()

    def commit(self, columns: SplitColumns, *, row: int) -> ShardEntry:
        """The shard's entry; its file is now complete on disk, and its samples are in the columns.

        Args:
            row: of this shard in the list of shards.
        """
        self._writer.close()
        content = self._buffer.getvalue()
        replace_file(self._path, content)
        entries = memoryview(content)
        for (key, members, attributes), start, end in zip(
            self._samples, self._bounds, self._bounds[1:], strict=False
        ):
            columns.add(
                key,
                shard=row,
                offset=start,
                length=end - start,
                crc32=crc32(entries[start:end]),
                members=members,
                attributes=attributes,
            )
        digest = hashlib.sha256(content).hexdigest()
        return ShardEntry(self._path.name, len(content), digest, len(self._samples))


def _require_readable(key: str, extension: str) -> None:
    """Raises ValueError for names that a reader would refuse or take for others."""
    name = f"{key}.{extension}"
    try:
        found = split_name(name)
    except BadEntries as error:
        raise ValueError(
            f"sample {key!r} {error}; keys are relative names, without '..' or backslashes"
        ) from error
    # webdataset's writer leaves out what begins with an underscore.
    if found != (key, extension) or extension.startswith("_"):
        raise ValueError(
            f"sample {key!r} has a member {extension!r}; extensions are of small letters, no '_' first"
        )
