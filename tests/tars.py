"""Tars as other tools write them, for tests."""

import io
import tarfile
from collections.abc import Iterable
from typing import Literal

TarFormat = Literal[0, 1, 2]  # ustar, GNU's, pax: as tarfile numbers them
END = bytes(1024)  # the zeros that end a tar


def plain(name: str, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """A file's entry."""
    entry = tarfile.TarInfo(name)
    entry.size = len(payload)
    return entry, payload


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """An entry that is no file: a link, a device, a folder."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry, b""


def tar_of(
    entries: Iterable[tuple[tarfile.TarInfo, bytes]], *, tar_format: TarFormat = tarfile.PAX_FORMAT
) -> bytes:
    """The entries as a tar, without the zeros that end one."""
    return b"".join(
        entry.tobuf(tar_format, "utf-8", "strict") + payload + bytes(-len(payload) % 512)
        for entry, payload in entries
    )


def sample(key: str, members: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The entries of a sample."""
    return [plain(f"{key}.{extension}", payload) for extension, payload in members.items()]


def with_sum(header: bytes) -> bytes:
    """A header whose sum is right again."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def read_by_tarfile(tar: bytes) -> list[tuple[str, int, int, bytes]]:
    """(name, place of the first header, place of the payload, payload) of every file, as tarfile has it."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
        found = []
        for entry in opened:
            file = opened.extractfile(entry)
            assert file is not None
            found.append((entry.name, entry.offset, entry.offset_data, file.read()))
        return found
