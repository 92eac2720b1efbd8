"""Tar entries, taken apart where they lie in memory: nothing is unpacked to a disk.

What honest tools write is understood (ustar, GNU long names, pax); anything else is refused by name.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BLOCK = 512  # tar pads headers and payloads to this many bytes

Members = Mapping[str, bytes | memoryview]
Buffer = bytes | memoryview | mmap.mmap

_PLAIN = (b"0", b"\0", b"7")
_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_EXTENDED = (b"x", b"X", b"g", b"L", b"K")  # headers that speak of the entry behind them
_MAX_EXTENDED_BYTES = 1 << 20
# The header of a plain file whose name is whole, leaves no folder, and has its first dot in front of the
# extension: mode, owner and group behind the name; the length; time and sum; the kind; then nothing of
# interest up to the place where ustar may have the start of the name.
_USUAL = re.compile(
    rb"(?=\w[\w/-]{0,80}(?<!/)\.([a-z0-9_.]{1,15})\0)"
    rb".{124}([0-7]{11})[\0 ].{20}0.{188}\0",
    re.ASCII | re.DOTALL,
)
_RECORD = re.compile(rb"([0-9]{1,8}) ([^=\n]+)=")


class BadEntries(ValueError):
    """Tar entries that are none, or that no honest tool has written.

    Attributes:
        entry: the name of the entry that is cut short; empty where it is something else.
    """

    def __init__(self, message: str, *, entry: str = "") -> None:
        super().__init__(message)
        self.entry = entry


class Entry(NamedTuple):
    """One tar entry: its name, tar's letter for its kind, where its first header, its payload start, and the
    payload's length; in bytes."""

    name: str
    kind: bytes
    begin: int
    start: int
    length: int

    @property
    def is_plain(self) -> bool:
        """Whether it is a file, and no link, device or folder."""
        return self.kind in _PLAIN and not self.is_folder

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder; old tars say so by their names alone."""
        return self.kind == b"5" or self.name.endswith("/")

    @property
    def end(self) -> int:
        """Where the next entry begins."""
        return self.start + padded(self.length)


def padded(num_bytes: int) -> int:
    """What a payload takes in a tar, in bytes."""
    return -(-num_bytes // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a tar entry, webdataset's way: the extension begins at the base name's first dot.

    Raises:
        BadEntries: the name is absolute, leaves its folder, or has no extension.
    """
    folder, _, base = name.rpartition("/")
    if name.startswith("/") or "\\" in name or ".." in folder.split("/") or "\0" in name:
        raise BadEntries(f"has an entry {name!r}, which points out of its folder")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        raise BadEntries(f"has an entry {name!r} without an extension")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def cut_members(entries: bytes) -> dict[str, memoryview]:
    """The payloads of a sample's tar entries by extension, as views of `entries`.

    Raises:
        BadEntries: they are cut short, hold links or devices, or an extension comes twice.
    """
    members = _cut_usual(entries)
    return _cut_any(entries) if members is None else members


def _cut_any(entries: bytes) -> dict[str, memoryview]:
    view, members = memoryview(entries), dict[str, memoryview]()
    for name, kind, _, start, length in entries_in(entries):
        if kind not in _PLAIN:
            raise BadEntries(f"has an entry {name!r} that is no plain file")
        _, extension = split_name(name)
        if extension in members:
            raise BadEntries(f"has two entries {name!r}")
        members[extension] = view[start : start + length]
    if not members:
        raise BadEntries("has no tar entries")
    return members


def _cut_usual(entries: bytes) -> dict[str, memoryview] | None:
    """The same as `_cut_any`, several times as fast, for entries as nearly all are; None where one is
    another, be it right or wrong."""
    view, members = memoryview(entries), dict[str, memoryview]()
    position, size = 0, len(entries)
    while position < size:
        usual = _USUAL.match(entries, position)
        if usual is None:
            return None
        extension, start, length = usual[1].decode(), position + BLOCK, int(usual[2], 8)
        if extension in members or start + length > size:
            return None
        members[extension] = view[start : start + length]
        position = start + padded(length)
    return members or None


def entries_in(tar: Buffer, *, has_sums_checked: bool = False) -> Iterator[Entry]:
    """Every entry of a tar, or of a stretch of one, up to the zeros that end it or to its last byte.

    Args:
        has_sums_checked: whether headers have to have the sum that they state. What is known by its crc32
            needs no such check, which takes longer than all the rest.

    Raises:
        BadEntries: the next entry is none, is cut short, or is a sparse file.
    """
    position, size = 0, len(tar)
    while position < size:
        header = _header(tar, position, has_sums_checked)
        if header is None:
            return
        kind, start = header[156:157], position + BLOCK
        if kind == b"0":  # by far the most frequent
            entry = Entry(_name(header), kind, position, start, _number(header[124:136]))
        elif kind in _EXTENDED:
            entry = _extended_entry(tar, position, has_sums_checked)
        else:
            entry = _entry(header, position, position)
        name, kind, _, start, length = entry
        if start + length > size:
            raise BadEntries(f"has an entry {name!r} that is cut short", entry=name)
        yield entry
        position = start + padded(length)


def _header(tar: Buffer, position: int, is_checked: bool) -> bytes | None:
    """The header there; None for zeros, which end a tar."""
    header = tar[position : position + BLOCK]
    if not isinstance(header, bytes):
        header = bytes(header)
    if len(header) < BLOCK:
        raise BadEntries("is cut short within a header")
    if header[0] == 0 and header.count(0) == BLOCK:
        return None
    if is_checked and _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadEntries("is no tar entry where it should be one")
    return header


def _entry(
    header: bytes, begin: int, position: int, *, name: str | None = None, length: int | None = None
) -> Entry:
    """The entry of a header at `position`; what extended headers said before goes first."""
    kind = header[156:157]
    if kind == b"S":
        raise BadEntries(f"has an entry {name or _name(header)!r} that is a sparse file")
    if kind in _WITHOUT_PAYLOAD:
        length = 0
    elif length is None:
        length = _number(header[124:136])
    return Entry(_name(header) if name is None else name, kind, begin, position + BLOCK, length)


def _extended_entry(tar: Buffer, begin: int, is_checked: bool) -> Entry:
    """An entry whose name or length takes entries of its own: GNU's way, or pax (POSIX.1-2001)."""
    name: str | None = None
    length: int | None = None
    position = begin
    while True:
        header = _header(tar, position, is_checked)
        if header is None:
            raise BadEntries("ends behind an extended header")
        kind = header[156:157]
        if kind not in _EXTENDED:
            return _entry(header, begin, position, name=name, length=length)
        num_bytes = _number(header[124:136])
        start = position + BLOCK
        if num_bytes > _MAX_EXTENDED_BYTES or start + num_bytes > len(tar):
            raise BadEntries(f"has an extended header of {num_bytes} bytes, cut short or too long")
        payload = bytes(tar[start : start + num_bytes])
        position = start + padded(num_bytes)
        if kind == b"L":
            name = _text(payload.split(b"\0", 1)[0])
        elif kind != b"K":  # a K names the target of a link, and links are refused
            records = _records(payload)
            if kind == b"g" and not records.keys().isdisjoint((b"path", b"size")):
                raise BadEntries("has a header for all entries that gives them one name or size")
            if any(key.startswith(b"GNU.sparse.") for key in records):
                raise BadEntries(
                    f"has an entry {name or _text(records.get(b'path', b''))!r} that is a sparse file"
                )
            if b"path" in records:
                name = _text(records[b"path"])
            if b"size" in records:
                length = _decimal(records[b"size"])


def _records(payload: bytes) -> dict[bytes, bytes]:
    """Of a pax header: `length key=value`, line by line."""
    records = {}
    position = 0
    while position < len(payload) and payload[position] != 0:
        match = _RECORD.match(payload, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise BadEntries("has an extended header that cannot be read")
        records[match[2]] = payload[match.end() : end - 1]
        position = end
    return records


def _name(header: bytes) -> str:
    """Of a ustar header (POSIX.1-1988)."""
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own headers have other things where ustar's have the start of the name.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise BadEntries(f"has an entry whose name is no UTF-8: {name!r}") from error


def _number(field: bytes) -> int:
    """Octal digits; or, of files of 8 GiB and more, GNU's binary form."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    try:
        if digits.isdigit():  # int() would take signs and underscores, too
            return int(digits, 8)
    except ValueError:
        digits = b"8 or 9"
    if digits:
        raise BadEntries("is no tar entry where it should be one")
    return 0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise BadEntries(f"has an entry of the size {text[:30]!r}")
    return int(text)
