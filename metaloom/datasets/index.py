"""The index of a data set: which shards there are, and where in them every sample lies (docs/data.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from metaloom.errors import StreamError

FORMAT = "metaloom-shards"
VERSION = 1
LAYOUTS = ("classes", "groups", "documents", "episodes")
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: its name beside the index, its size in bytes, the sha256 of the whole file."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class ClassEntry:
    """One class of a split: a name unique in the data set, and the script or family that it belongs to."""

    name: str
    script: str = ""


@dataclass(frozen=True, eq=False)
class MemberTable:
    """Where one kind of member (`png`, `txt` ...) of every sample lies; int64, [number of samples] each."""

    offset: NDArray[np.int64]  # bytes from the start of the shard to the payload
    length: NDArray[np.int64]  # bytes
    crc32: NDArray[np.int64]  # of the payload


@dataclass(frozen=True, eq=False)
class SplitTable:
    """The samples of one split, as columns of equal length.

    `attributes` holds integer columns; of layout `classes` they are `class` (row of `classes`) and `variant`
    (the rendering, writer or device that made the sample; every class has each variant exactly once).
    """

    name: str
    keys: tuple[str, ...]
    shard: NDArray[np.int64]  # row of Index.shards
    members: Mapping[str, MemberTable]
    attributes: Mapping[str, NDArray[np.int64]]
    classes: tuple[ClassEntry, ...]  # empty for layout "documents"

    @property
    def num_samples(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class Index:
    """A data set that can be read: its origin, shards and splits. Cheap to pickle; holds no open file."""

    url: str
    dataset: str
    layout: str
    digest: str  # of the shards' digests: two data sets with one digest hold the same bytes
    source: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    splits: Mapping[str, SplitTable]

    @classmethod
    def load(cls, url: str | os.PathLike[str]) -> Index:
        """The index of the data set at any path or fsspec URL, checked for form.

        Raises:
            StreamError: there is no index, or it is damaged, or of a version that this program cannot read.
        """
        url = os.fspath(url)
        file, root = open_filesystem(url)
        path = f"{root}/{INDEX_NAME}"
        try:
            text = file.cat_file(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StreamError(
                f"{url} holds no {INDEX_NAME}, so it is not a finished metaloom data set. Make one with "
                f"`metaloom data make glyphs {url}` or `metaloom data make stdlib {url}`, or correct "
                f"the path."
            ) from error
        except OSError as error:
            raise StreamError(f"{url}/{INDEX_NAME} cannot be read: {error}") from error
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise StreamError(
                f"{url}/{INDEX_NAME} is not JSON ({error}); the file is damaged. {_remake(url)}"
            ) from error
        return _parse(url, raw)

    def split(self, name: str) -> SplitTable:
        """The split of that name.

        Raises:
            StreamError: there is no such split.
        """
        if name not in self.splits:
            raise StreamError(
                f"{self.dataset} at {self.url} has no split {name!r}; it has {', '.join(self.splits)}."
            )
        return self.splits[name]

    def verify_sizes(self) -> None:
        """Returns if every shard exists with the recorded size; one look-up per shard, nothing is read.

        Raises:
            StreamError: lists all shards that are missing or of another size.
        """
        file, root = open_filesystem(self.url)
        wrong = []
        for shard in self.shards:
            try:
                size = int(file.info(f"{root}/{shard.name}")["size"])
            except FileNotFoundError:
                wrong.append(f"{shard.name}: missing, expected {shard.num_bytes} bytes")
                continue
            except OSError as error:
                raise StreamError(f"{self.url}/{shard.name} cannot be looked up: {error}") from error
            if size != shard.num_bytes:
                verb = "truncated" if size < shard.num_bytes else "too long"
                wrong.append(f"{shard.name}: {verb}, {size} bytes, expected {shard.num_bytes}")
        if wrong:
            raise StreamError(self._wrong_shards(wrong))

    def verify_digests(self) -> None:
        """Returns if every shard has the recorded sha256; reads every byte of the data set.

        Raises:
            StreamError: lists all shards that are missing, of another size, or with other bytes.
        """
        self.verify_sizes()
        file, root = open_filesystem(self.url)
        wrong = []
        for shard in self.shards:
            digest = hashlib.sha256()
            with file.open(f"{root}/{shard.name}", "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != shard.sha256:
                wrong.append(f"{shard.name}: sha256 {digest.hexdigest()}, expected {shard.sha256}")
        if wrong:
            raise StreamError(self._wrong_shards(wrong))

    def _wrong_shards(self, wrong: Sequence[str]) -> str:
        listing = "\n".join(f"  {line}" for line in wrong)
        return (
            f"{len(wrong)} of {len(self.shards)} shards of {self.dataset} at {self.url} are not what "
            f"{INDEX_NAME} records:\n{listing}\n{remake_advice(self.dataset, self.url)}"
        )


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it, without a trailing slash.

    Raises:
        StreamError: the scheme is unknown, or its driver is not installed.
    """
    try:
        file, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StreamError(f"{url}: this URL cannot be opened: {error}") from error
    return file, str(root).rstrip("/")


def remake_advice(dataset: str, url: str) -> str:
    """The sentence that says how to get a damaged data set back."""
    if dataset in ("glyphs", "stdlib"):
        return f"Delete {url} and run `metaloom data make {dataset} {url}`, or copy the shards there again."
    return f"Copy the shards to {url} again."


def shards_digest(shards: Sequence[ShardEntry]) -> str:
    """The digest of a data set: sha256 over the lines `name sha256` of its shards, in order."""
    lines = "".join(f"{shard.name} {shard.sha256}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def _remake(url: str) -> str:
    return f"Delete {url} and run `metaloom data make glyphs|stdlib {url}`, or copy the data set there again."


def _parse(url: str, raw: Any) -> Index:
    where = f"{url}/{INDEX_NAME}"
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise StreamError(
            f"{where} is not the index of a metaloom data set: its format is {found!r}, not {FORMAT!r}. "
            f"{_remake(url)}"
        )
    if raw.get("version") != VERSION:
        raise StreamError(
            f"{where} has version {raw.get('version')!r}; this metaloom reads version {VERSION}. "
            f"Use the metaloom that wrote it, or make the data set again in another directory."
        )
    try:
        shards = tuple(
            ShardEntry(str(s["name"]), int(s["bytes"]), str(s["sha256"]), int(s["num_samples"]))
            for s in raw["shards"]
        )
        splits = {str(name): _parse_split(str(name), table) for name, table in raw["splits"].items()}
        index = Index(
            url=url.rstrip("/"),
            dataset=str(raw["dataset"]),
            layout=str(raw["layout"]),
            digest=str(raw["digest"]),
            source=dict(raw["source"]),
            shards=shards,
            splits=splits,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StreamError(f"{where} is damaged: {type(error).__name__}: {error}. {_remake(url)}") from error
    _check(index, where)
    return index


def _parse_split(name: str, raw: Mapping[str, Any]) -> SplitTable:
    members = {
        str(member): MemberTable(*(_integers(table[column]) for column in ("offset", "length", "crc32")))
        for member, table in raw["members"].items()
    }
    return SplitTable(
        name=name,
        keys=tuple(str(key) for key in raw["keys"]),
        shard=_integers(raw["shard"]),
        members=members,
        attributes={str(column): _integers(values) for column, values in raw["attributes"].items()},
        classes=tuple(ClassEntry(str(c["name"]), str(c["script"])) for c in raw["classes"]),
    )


def _integers(values: Any) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"a column is not a list of integers but {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _check(index: Index, where: str) -> None:
    problems = []
    if index.layout not in LAYOUTS:
        problems.append(f"layout {index.layout!r} is none of {', '.join(LAYOUTS)}")
    if index.digest != shards_digest(index.shards):
        problems.append("its digest is not that of its list of shards")
    for split in index.splits.values():
        columns = [split.shard, *split.attributes.values()]
        for member in split.members.values():
            columns += [member.offset, member.length, member.crc32]
        if any(len(column) != split.num_samples for column in columns):
            problems.append(f"split {split.name!r}: columns of different length")
            continue
        if not split.num_samples:
            continue
        if not 0 <= split.shard.min() <= split.shard.max() < len(index.shards):
            problems.append(f"split {split.name!r}: samples in shards that are not listed")
            continue
        ends = np.array([shard.num_bytes for shard in index.shards])[split.shard]
        for member in split.members.values():
            if (member.offset < 0).any() or (member.length < 0).any():
                problems.append(f"split {split.name!r}: negative offsets or lengths")
            elif (member.offset + member.length > ends).any():
                problems.append(f"split {split.name!r}: samples beyond the end of their shards")
        if index.layout == "classes":
            number = split.attributes.get("class")
            if number is None:
                problems.append(f"split {split.name!r}: no column 'class'")
            elif not 0 <= number.min() <= number.max() < len(split.classes):
                problems.append(f"split {split.name!r}: samples of classes that are not listed")
    if problems:
        raise StreamError(f"{where} is damaged: {'; '.join(problems)}. {_remake(index.url)}")
