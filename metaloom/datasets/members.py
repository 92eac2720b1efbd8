"""The tar entries of one sample, taken apart in memory: nothing is unpacked to a disk."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping

_BLOCK = 512

Members = Mapping[str, bytes | memoryview]


class BadEntries(ValueError):
    """Tar entries that are none, or that no honest tool has written."""


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
    view = memoryview(entries)
    members: dict[str, memoryview] = {}
    for name, start, length in entry_places(entries):
        _, extension = split_name(name)
        if extension in members:
            raise BadEntries(f"has two entries {name!r}")
        members[extension] = view[start : start + length]
    if not members:
        raise BadEntries("has no tar entries")
    return members


def entry_places(entries: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, start, length) of every file in a stretch of tar entries; a padded end may follow.

    Raises:
        BadEntries: as `cut_members`.
    """
    position = 0
    while position + _BLOCK <= len(entries) and entries[position] != 0:
        header = entries[position : position + _BLOCK]
        if header[156:157] not in (b"0", b"\0"):
            yield from _with_extended_headers(entries[position:], position)
            return
        name, length = _name(header), _length(header)
        start = position + _BLOCK
        if start + length > len(entries):
            raise BadEntries(f"has an entry {name!r} that is cut short")
        yield name, start, length
        position = start + -(-length // _BLOCK) * _BLOCK


def _name(header: bytes) -> str:
    """Of a ustar header (POSIX 1003.1-1988)."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:262] == b"ustar" else b""
    try:
        return (prefix + b"/" + name if prefix else name).decode()
    except UnicodeDecodeError as error:
        raise BadEntries(f"has an entry whose name is no UTF-8: {name!r}") from error


def _length(header: bytes) -> int:
    try:
        return int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise BadEntries("is no tar entry where it should be one") from error


def _with_extended_headers(entries: bytes, offset: int) -> Iterator[tuple[str, int, int]]:
    """The same where names are long or other than ASCII, which takes entries of their own."""
    try:
        with tarfile.open(fileobj=io.BytesIO(entries), mode="r:") as tar:
            for entry in tar:
                if not entry.isreg() or entry.sparse is not None:
                    raise BadEntries(f"has an entry {entry.name!r} that is no plain file")
                if entry.offset_data + entry.size > len(entries):
                    raise BadEntries(f"has an entry {entry.name!r} that is cut short")
                yield entry.name, offset + entry.offset_data, entry.size
    except (tarfile.TarError, ValueError, UnicodeError) as error:
        if isinstance(error, BadEntries):
            raise
        raise BadEntries(f"has tar entries that cannot be read: {error}") from error
