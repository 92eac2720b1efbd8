"""Samples by number: read by byte range, checked, decoded, and kept in memory as long as there is room."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from metaloom.datasets.broken import BrokenSample
from metaloom.datasets.decoders import DECODING_ERRORS, read_class, read_class_name
from metaloom.datasets.index import Index, SplitTable
from metaloom.datasets.members import Members, cut_members
from metaloom.datasets.storage import Extent, MissingFile, TruncatedFile

_LOG = logging.getLogger(__name__)

Decoded = Mapping[str, NDArray[Any]]

MEMORY_BYTES = 256 << 20
OVERHEAD_BYTES = 512  # of a decoded sample that is kept: its arrays and mappings as objects
SAMPLE_LIMIT_BYTES = 256 << 20


class SampleReader:
    """The samples of one split, decoded one way.

    What was decoded is kept, least recently used out first. A reader may be used by several threads; pickled,
    it starts empty.

    Args:
        decode: from members to arrays by name; may raise DECODING_ERRORS.
        memory_bytes: the most that decoded samples may take; 0 keeps none.
        sample_limit_bytes: a larger sample is broken: it is not even fetched.

    Raises:
        StreamError: there is no such split.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        decode: Callable[[Members], Decoded],
        *,
        memory_bytes: int = MEMORY_BYTES,
        sample_limit_bytes: int = SAMPLE_LIMIT_BYTES,
    ) -> None:
        self.index, self.table = index, index.split(split)
        self._decode = decode
        self._memory_bytes, self._sample_limit_bytes = memory_bytes, sample_limit_bytes
        self._kept: OrderedDict[int, Decoded] = OrderedDict()
        self._kept_bytes = 0
        self._broken: dict[int, BrokenSample] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., SampleReader], tuple[Any, ...]]:
        return _reader, (
            self.index,
            self.table.name,
            self._decode,
            self._memory_bytes,
            self._sample_limit_bytes,
        )

    @property
    def kept_bytes(self) -> int:
        """What the decoded samples take now, as objects too."""
        return self._kept_bytes

    def read(self, numbers: Sequence[int]) -> list[Decoded | BrokenSample]:
        """Each sample's arrays, read-only; or what is wrong with it, for good.

        Raises:
            StreamError: storage failed, although it was asked again and again.
        """
        found: dict[int, Decoded | BrokenSample] = {}
        with self._lock:
            for number in numbers:
                if number in self._kept:
                    self._kept.move_to_end(number)
                    found[number] = self._kept[number]
                elif number in self._broken:
                    found[number] = self._broken[number]
        missing = [number for number in dict.fromkeys(numbers) if number not in found]
        if missing:
            found.update(self._read_anew(missing))
        return [found[number] for number in numbers]

    def is_broken(self, number: int, reason: str) -> BrokenSample:
        """A sample with what is wrong with it."""
        shard = self.index.shards[int(self.table.shard[number])].name
        return BrokenSample(self.index.url, shard, self.table.key(number), reason)

    def _read_anew(self, numbers: Sequence[int]) -> dict[int, Decoded | BrokenSample]:
        # Not sample by sample: what one step of the work needs stays in the processor's caches.
        whole: dict[int, Members] = {}
        found: dict[int, Decoded | BrokenSample] = {}
        for number, payload in zip(numbers, self._fetch(numbers), strict=True):
            members = self._members(number, payload) if isinstance(payload, bytes) else payload
            if isinstance(members, BrokenSample):
                found[number] = members
            else:
                whole[number] = members
        for number, members in whole.items():
            found[number] = self._decoded(number, members)
        self._keep(found)
        return found

    def _fetch(self, numbers: Sequence[int]) -> list[bytes | BrokenSample]:
        """The tar entries of each sample, as they were written."""
        results: dict[int, bytes | BrokenSample] = {}
        wanted: dict[int, tuple[Extent, int]] = {}
        for number, extent, expected in zip(numbers, *self._places(numbers), strict=True):
            if extent.length > self._sample_limit_bytes:
                results[number] = self.is_broken(
                    number, f"has {extent.length} bytes, over the limit of {self._sample_limit_bytes}"
                )
            else:
                wanted[number] = extent, expected
        payloads: Sequence[bytes | None]
        try:
            payloads = self.index.storage.read_extents([extent for extent, _ in wanted.values()])
        except (MissingFile, TruncatedFile):
            payloads = [None] * len(wanted)  # one by one, to see which it is
        for note in self.index.storage.take_notes():
            _LOG.warning(note)
        for (number, place), payload in zip(wanted.items(), payloads, strict=True):
            results[number] = self._checked(number, *place, payload)
        return [results[number] for number in numbers]

    def _places(self, numbers: Sequence[int]) -> tuple[list[Extent], list[int]]:
        """Where each sample lies, and its checksum."""
        table, shards = self.table, self.index.shards
        rows = np.asarray(numbers, np.int64)  # looked up together: one takes nearly as long as a hundred
        places = (column[rows].tolist() for column in (table.shard, table.offset, table.length))
        extents = [
            Extent(shards[shard].name, start, length, shards[shard].num_bytes)
            for shard, start, length in zip(*places, strict=True)
        ]
        return extents, table.crc32[rows].tolist()

    def _checked(
        self, number: int, extent: Extent, expected: int, payload: bytes | None
    ) -> bytes | BrokenSample:
        if payload is not None and crc32(payload) == expected:
            return payload
        # A block of the cache may be torn, and a network may have changed a bit: once more, from storage.
        self.index.storage.forget(extent)
        try:
            (payload,) = self.index.storage.read_extents([extent])
        except MissingFile:
            return self.is_broken(number, "is lost: the shard is missing")
        except TruncatedFile as error:
            return self.is_broken(number, f"is cut off: {error}")
        if crc32(payload) != expected:
            self.index.storage.forget(extent)
            return self.is_broken(
                number,
                f"is damaged: bytes {extent.start} to {extent.stop} have crc32 "
                f"{crc32(payload):08x} instead of {expected:08x}",
            )
        return payload

    def _members(self, number: int, payload: bytes) -> Members | BrokenSample:
        try:
            members = cut_members(payload)
            require_class(self.table, number, members)
        except DECODING_ERRORS as error:
            return self.is_broken(number, f"cannot be decoded: {error}")
        return members

    def _decoded(self, number: int, members: Members) -> Decoded | BrokenSample:
        try:
            return self._decode(members)
        except DECODING_ERRORS as error:
            return self.is_broken(number, f"cannot be decoded: {error}")

    def _keep(self, found: Mapping[int, Decoded | BrokenSample]) -> None:
        """Keeps samples for the next time, and makes all of them read-only."""
        with self._lock:
            for number, arrays in found.items():
                if isinstance(arrays, BrokenSample):
                    self._broken[number] = arrays
                    continue
                for array in arrays.values():
                    array.flags.writeable = False
                size = _num_bytes(arrays)
                if number in self._kept or size > self._memory_bytes:
                    continue
                # A view would keep all that it was cut out of.
                self._kept[number] = {name: _owned(array) for name, array in arrays.items()}
                self._kept_bytes += size
                while self._kept_bytes > self._memory_bytes:
                    self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])


def require_class(table: SplitTable, number: int, members: Members) -> None:
    """Raises ValueError if a sample's `cls`, where it has one, says another class than its row in the
    index."""
    rows = table.attributes.get("class")
    if rows is None or "cls" not in members:
        return
    listed = int(rows[number])
    stated: int | str = listed
    expected: int | str = listed
    if table.cls_holds == "row":
        if members["cls"] == b"%d" % listed:  # as metaloom writes it
            return
        stated = read_class(members["cls"])
    elif table.cls_holds == "name":
        stated, expected = read_class_name(members["cls"]), table.classes[listed]
    if stated != expected:
        raise ValueError(f"its cls says class {stated!r}, the index {expected!r}")


def _reader(*arguments: Any) -> SampleReader:
    index, split, decode, memory_bytes, sample_limit_bytes = arguments
    return SampleReader(
        index, split, decode, memory_bytes=memory_bytes, sample_limit_bytes=sample_limit_bytes
    )


def _num_bytes(arrays: Decoded) -> int:
    return OVERHEAD_BYTES + sum(array.nbytes for array in arrays.values())


def _owned(array: NDArray[Any]) -> NDArray[Any]:
    if array.base is not None:
        array = array.copy()
        array.flags.writeable = False
    return array
