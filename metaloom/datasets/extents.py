"""Stretches of bytes of named files: put together into few requests, and cut out of what came back."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """Bytes `start` to `start + length` of a file that is recorded to have `file_bytes`.

    Raises:
        ValueError: the bytes are not within the file.
    """

    name: str
    start: int
    length: int
    file_bytes: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 0 or self.start + self.length > self.file_bytes:
            raise ValueError(
                f"bytes {self.start} to {self.start + self.length} of {self.name!r} are not within its "
                f"{self.file_bytes} bytes"
            )

    @property
    def stop(self) -> int:
        return self.start + self.length


def parts_by_block(extent: Extent, block_bytes: int) -> list[Extent]:
    """The extent, cut where a block of `block_bytes` ends: each part lies in one block."""
    cuts = range(extent.start - extent.start % block_bytes, extent.stop, block_bytes)
    return [
        Extent(extent.name, start, min(cut + block_bytes, extent.stop) - start, extent.file_bytes)
        for cut in cuts
        if (start := max(cut, extent.start)) < extent.stop
    ]


def block_of(part: Extent, block_bytes: int) -> Extent:
    """The whole block that a part lies in; the last block of a file ends where the file does."""
    start = part.start - part.start % block_bytes
    return Extent(part.name, start, min(block_bytes, part.file_bytes - start), part.file_bytes)


def coalesced(extents: Iterable[Extent], max_bytes: int) -> list[Extent]:
    """Disjoint extents, by name and place, that cover exactly the bytes of the given ones.

    What overlaps or touches is joined; what is longer than `max_bytes` is cut every `max_bytes` from its
    start.
    """
    joined: list[Extent] = []
    for extent in sorted(set(extents), key=lambda e: (e.name, e.file_bytes, e.start, e.stop)):
        if not extent.length:
            continue
        last = joined[-1] if joined else None
        if last is None or extent.start > last.stop or _file(extent) != _file(last):
            joined.append(extent)
        else:
            length = max(last.stop, extent.stop) - last.start
            joined[-1] = Extent(last.name, last.start, length, last.file_bytes)
    return [part for extent in joined for part in _cut_every(extent, max_bytes)]


def _file(extent: Extent) -> tuple[str, int]:
    return extent.name, extent.file_bytes


def _cut_every(extent: Extent, max_bytes: int) -> list[Extent]:
    return [
        Extent(extent.name, start, min(max_bytes, extent.stop - start), extent.file_bytes)
        for start in range(extent.start, extent.stop, max_bytes)
    ]


class Pieces:
    """Bytes of disjoint extents, from which any extent can be cut that they cover."""

    def __init__(self) -> None:
        self._starts: dict[tuple[str, int], list[int]] = {}
        self._content: dict[tuple[str, int, int], bytes] = {}

    def add(self, extent: Extent, content: bytes) -> None:
        bisect.insort(self._starts.setdefault((extent.name, extent.file_bytes), []), extent.start)
        self._content[extent.name, extent.file_bytes, extent.start] = content

    def cut(self, extent: Extent) -> bytes:
        """The bytes of an extent, all of which must have been added; without a copy where it is one piece."""
        if not extent.length:
            return b""
        starts = self._starts[extent.name, extent.file_bytes]
        found: list[memoryview] = []
        place = extent.start
        number = bisect.bisect_right(starts, place) - 1
        while place < extent.stop:
            start = starts[number]
            content = self._content[extent.name, extent.file_bytes, start]
            if start == extent.start and len(content) == extent.length:
                return content
            found.append(memoryview(content)[place - start : extent.stop - start])
            place += len(found[-1])
            number += 1
        return b"".join(found)
