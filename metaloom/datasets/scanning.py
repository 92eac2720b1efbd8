"""One tar that another tool has written: which samples lie where, and which cannot be used."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from metaloom.datasets.decoders import DECODING_ERRORS, MAX_NAME_BYTES, read_class_name, read_npy
from metaloom.datasets.members import BadEntries, Entry, Members, entries_in, split_name

_CHUNK_BYTES = 1 << 20


class Facts(NamedTuple):
    """What the index says of a sample; None where its layout has no such thing."""

    label: str | None
    group: str | None
    size: int | None


@dataclass(frozen=True)
class ScanRules:
    """What is looked for in every sample.

    Attributes:
        layout: of the data set.
        class_from: `cls`, `folder` or `json:KEY`; None where samples have no class.
        group_from: `json:KEY`, or None.
        sample_limit_bytes: larger samples cannot be used.
    """

    layout: str
    class_from: str | None
    group_from: str | None
    sample_limit_bytes: int

    def facts(self, key: str, members: Members) -> Facts:
        """What the index says of a sample.

        Raises:
            one of DECODING_ERRORS: it lacks what the rules look for.
        """
        if self.layout == "episodes":
            for part in ("support", "query"):
                if not any(extension.startswith(f"{part}.") for extension in members):
                    raise ValueError(f"it has {', '.join(members)}, and no {part}")
        label = None if self.class_from is None else _label(self.class_from, key, members)
        group = None if self.group_from is None else _json_name(self.group_from, members)
        return Facts(label, group, _num_tokens(members) if self.layout == "documents" else None)


class ScannedSample(NamedTuple):
    """A sample that can be used: where its tar entries lie, in bytes, and what the index says of it."""

    key: str
    offset: int
    length: int
    crc32: int
    extensions: tuple[str, ...]
    facts: Facts


@dataclass(frozen=True)
class ScannedShard:
    """One tar: its samples in order, and (key, reason) of those that cannot be used."""

    name: str
    num_bytes: int
    sha256: str
    samples: list[ScannedSample]
    broken: list[tuple[str, str]]


def scan_shard(path: Path, rules: ScanRules) -> ScannedShard:
    """What a tar holds. It is mapped into memory and read once; one sample is held at a time.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not num_bytes:
            broken = [("(byte 0)", "is lost: the file is empty, and not even an empty tar is")]
            return ScannedShard(path.name, 0, hashlib.sha256().hexdigest(), [], broken)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            samples, broken = _scan(tar, rules)
            digest = hashlib.sha256()
            for chunk in _chunks(tar, 0):
                digest.update(chunk)
            return ScannedShard(path.name, num_bytes, digest.hexdigest(), samples, broken)


@dataclass
class _Piece:
    """Entries of one key that lie next to each other."""

    key: str
    begin: int
    end: int
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # start and length by extension
    problem: str = ""

    def add(self, entry: Entry, extension: str) -> None:
        self.end = entry.end
        if not entry.is_plain:
            self.problem = self.problem or f"has an entry {entry.name!r} that is no plain file"
        elif extension in self.places:
            self.problem = self.problem or f"has two entries {entry.name!r}"
        self.places[extension] = (entry.start, entry.length)


def _scan(tar: mmap.mmap, rules: ScanRules) -> tuple[list[ScannedSample], list[tuple[str, str]]]:
    pieces, broken = _pieces(tar)
    by_key: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        by_key[piece.key].append(piece)
    samples = []
    for key, those in by_key.items():
        sample = _sample(tar, key, those, rules)
        if isinstance(sample, str):
            broken.append((key, sample))
        else:
            samples.append(sample)
    return samples, broken


def _pieces(tar: mmap.mmap) -> tuple[list[_Piece], list[tuple[str, str]]]:
    """The entries of a tar, those of one key that lie together as one; and what is no sample."""
    pieces: list[_Piece] = []
    broken: list[tuple[str, str]] = []
    is_open = False  # whether the next entry may belong to the last piece
    position = 0
    try:
        for entry in entries_in(tar, has_sums_checked=True):
            position = entry.end
            if entry.is_folder:
                is_open = False
                continue
            try:
                key, extension = split_name(entry.name)
            except BadEntries as error:
                broken.append((entry.name, str(error)))
                is_open = False
                continue
            if not is_open or pieces[-1].key != key:
                pieces.append(_Piece(key, entry.begin, entry.end))
                is_open = True
            pieces[-1].add(entry, extension)
    except BadEntries as error:
        _note_damage(error, position, pieces, broken)
    else:
        _note_end(tar, position, pieces, broken)
    return pieces, broken


def _note_damage(
    error: BadEntries, position: int, pieces: list[_Piece], broken: list[tuple[str, str]]
) -> None:
    """Names the sample that damage takes away: the one before it, unless it is known to be another."""
    where = f"at byte {position} the tar {error}, and nothing behind it can be found"
    try:
        key = split_name(error.entry)[0] if error.entry else ""
    except BadEntries:
        key = error.entry
    if pieces and key in ("", pieces[-1].key):
        pieces[-1].problem = f"is cut off: {where}"
    else:
        broken.append((key or f"(byte {position})", f"is cut off: {where}"))


def _note_end(tar: mmap.mmap, position: int, pieces: list[_Piece], broken: list[tuple[str, str]]) -> None:
    """Names what is wrong with the end of a tar."""
    if position >= len(tar):
        if pieces:
            last = pieces[-1]
            last.problem = f"may be cut off: the tar stops at byte {position}, without the zeros that end one"
    elif any(chunk.count(0) != len(chunk) for chunk in _chunks(tar, position)):
        broken.append((f"(byte {position})", "lies behind the end of the tar, where no reader looks"))


def _sample(tar: mmap.mmap, key: str, pieces: list[_Piece], rules: ScanRules) -> ScannedSample | str:
    """A sample, or what is wrong with it."""
    if len(pieces) > 1:
        extensions = [extension for piece in pieces for extension in piece.places]
        if len(set(extensions)) == len(extensions):
            return "has entries that are not next to each other"
        return f"comes {len(pieces)} times in this tar; keys are names"
    (piece,) = pieces
    length = piece.end - piece.begin
    if piece.problem:
        return piece.problem
    if length > rules.sample_limit_bytes:
        return f"has {length} bytes, over the limit of {rules.sample_limit_bytes}"
    entries = tar[piece.begin : piece.end]
    if len(entries) != length:
        return f"is cut off: {len(entries)} of its {length} bytes are there"
    members = {name: entries[start - piece.begin :][:size] for name, (start, size) in piece.places.items()}
    try:
        facts = rules.facts(key, members)
    except DECODING_ERRORS as error:
        return f"cannot be indexed: {error}"
    return ScannedSample(key, piece.begin, length, crc32(entries), tuple(members), facts)


def _label(class_from: str, key: str, members: Members) -> str:
    if class_from == "cls":
        if "cls" not in members:
            raise ValueError(f"it has {', '.join(members)}, and no cls")
        return read_class_name(members["cls"])
    if class_from == "folder":
        folder = key.rpartition("/")[0].rpartition("/")[2]
        if folder in ("", "."):
            raise ValueError("it lies in no folder")
        return folder
    return _json_name(class_from, members)


def _json_name(rule: str, members: Members) -> str:
    """The text or number in `json` that `json:KEY` names."""
    name = rule.removeprefix("json:")
    if "json" not in members:
        raise ValueError(f"it has {', '.join(members)}, and no json")
    record = json.loads(bytes(members["json"]))
    value = record.get(name) if isinstance(record, dict) else None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not text or not text.isprintable() or len(text) > MAX_NAME_BYTES:
        raise ValueError(
            f"its json has {str(value)[:50]!r} as {name!r}, and a text or whole number is expected"
        )
    return text


def _num_tokens(members: Members) -> int:
    if "tokens.npy" in members:
        tokens = read_npy(members["tokens.npy"])
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are integers in one row, not {tokens.dtype} {list(tokens.shape)}")
        return len(tokens)
    if "txt" in members:
        return len(members["txt"])
    raise ValueError(f"it has {', '.join(members)}, and neither tokens.npy nor txt")


def _chunks(tar: mmap.mmap, start: int) -> Iterator[bytes]:
    for position in range(start, len(tar), _CHUNK_BYTES):
        yield tar[position : position + _CHUNK_BYTES]
