"""The index of a data set: which shards there are, and where in them every sample lies (docs/data.md)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.storage import MissingFile, Storage, StorageSettings
from metaloom.errors import StreamError
from metaloom.files import replace_file

_LOG = logging.getLogger(__name__)

FORMAT = "metaloom-shards"
VERSION = 2
LAYOUTS = ("classes", "groups", "documents", "episodes")
# What the member `cls` of a sample holds: the row of its class, the name of its class, or something else.
CLS_HOLDS = ("row", "name", "other")
INDEX_NAME = "index.json"
# How a columns file, which is in the safetensors format, names its numbers.
_DTYPES = {"U8": "<u1", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
# The columns that every split has, and their numbers.
_PLACES = {"shard": "I32", "offset": "I64", "length": "I64", "crc32": "U32", "key_end": "I64", "keys": "U8"}
ATTRIBUTE = "attribute."


@dataclass(frozen=True)
class FileEntry:
    """A file beside the index: its name, its size in bytes, the sha256 of the whole file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """One tar file."""

    num_samples: int


@dataclass(frozen=True, eq=False)
class SplitTable:
    """The samples of one split as columns, mapped into memory: what is not looked at is not read.

    A sample is a stretch of its shard: all of its tar entries, from the first header to the end of the last
    one's padding.

    Attributes:
        name: of the split.
        shard: row of `Index.shards`, int32 [number of samples], as all columns.
        offset: bytes from the start of the shard to the sample, int64.
        length: bytes, int64.
        crc32: of those bytes, uint32.
        attributes: integer columns by name: `class` (row of `classes`), `group` (row of `groups`), `variant`
            (the rendering, writer or device that made the sample), `size` (bytes of a text, or tokens).
        members: extensions that samples of this split have.
        classes: names.
        groups: names of users, domains or corruptions.
        cls_holds: one of CLS_HOLDS; what is a row or a name has to agree with the column `class`.
    """

    name: str
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    key_end: NDArray[np.int64]
    keys: NDArray[np.uint8]
    attributes: Mapping[str, NDArray[np.integer[Any]]]
    members: tuple[str, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    cls_holds: str = "row"

    @property
    def num_samples(self) -> int:
        return len(self.shard)

    def key(self, number: int) -> str:
        """The key of a sample."""
        start = int(self.key_end[number - 1]) if number else 0
        # A key is what messages name a sample by: one that is no UTF-8 must not stop them.
        return self.keys[start : int(self.key_end[number])].tobytes().decode(errors="backslashreplace")


@dataclass(frozen=True, eq=False)
class Index:
    """A data set that can be read: its origin, shards and splits. Pickled, it is its URL: it is read
    again."""

    url: str
    dataset: str
    layout: str
    digest: str  # of all files: two data sets with one digest hold the same bytes
    source: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    columns: Mapping[str, FileEntry]  # by split
    splits: Mapping[str, SplitTable]
    storage: Storage

    @classmethod
    def load(cls, url: str | os.PathLike[str], settings: StorageSettings | None = None) -> Index:
        """The index of the data set at any path or fsspec URL, checked for form.

        Raises:
            StreamError: there is no index, or it is damaged, or of a version that this program cannot read.
        """
        url = os.fspath(url).rstrip("/")
        settings = settings or StorageSettings()
        with Storage(url, settings) as storage:
            try:
                text = storage.read(INDEX_NAME)
            except MissingFile as error:
                raise StreamError(
                    f"{url} holds no {INDEX_NAME}, so it is not a finished metaloom data set. Make one with "
                    f"`metaloom data make glyphs|stdlib {url}` or `metaloom data pack`, or correct the path."
                ) from error
            try:
                raw = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise StreamError(
                    f"{url}/{INDEX_NAME} is not JSON ({error}); the file is damaged. {_again(url)}"
                ) from error
            return _parse(url, raw, storage)

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[str, StorageSettings, str]]:
        return _reload, (self.url, self.storage.settings, self.digest)

    def close(self) -> None:
        """Closes connections and files; reading opens them again."""
        self.storage.close()

    def split(self, name: str) -> SplitTable:
        """The split of that name.

        Raises:
            StreamError: there is no such split.
        """
        if name not in self.splits:
            raise StreamError(
                f"{self.dataset} at {self.url} has no split {name!r}; it has {', '.join(self.splits)}. Name "
                "one of these. Runs need train, validation and test: pack again with --split "
                "train=0.7,validation=0.15,test=0.15, or call the tars so before `metaloom data index`."
            )
        return self.splits[name]


def remake_advice(dataset: str, url: str) -> str:
    """The sentence that says how to get a damaged data set back."""
    if dataset in ("glyphs", "stdlib"):
        return f"Delete {url} and run `metaloom data make {dataset} {url}`, or copy the shards there again."
    return f"Copy the shards to {url} again."


def data_digest(files: Sequence[FileEntry]) -> str:
    """The digest of a data set: sha256 over the lines `name sha256` of its files, shards first."""
    lines = "".join(f"{file.name} {file.sha256}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def columns_name(split: str) -> str:
    """The file of a split's columns."""
    return f"{split}.columns"


def _again(url: str) -> str:
    return f"Make the data set at {url} again, or copy it there again."


def _reload(url: str, settings: StorageSettings, digest: str) -> Index:
    index = Index.load(url, settings)
    if index.digest != digest:
        raise StreamError(
            f"{url} was replaced by other data while it was in use (digest {index.digest[:12]}, before "
            f"{digest[:12]}). Start again, and leave data sets in use as they are."
        )
    return index


def _parse(url: str, raw: Any, storage: Storage) -> Index:
    where = f"{url}/{INDEX_NAME}"
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise StreamError(
            f"{where} is not the index of a metaloom data set: its format is {found!r}, not {FORMAT!r}. "
            f"{_again(url)}"
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
        tables = dict(raw["splits"])
        columns = {
            str(name): FileEntry(
                str(t["columns"]["name"]), int(t["columns"]["bytes"]), str(t["columns"]["sha256"])
            )
            for name, t in tables.items()
        }
        index = Index(
            url=url,
            dataset=str(raw["dataset"]),
            layout=str(raw["layout"]),
            digest=str(raw["digest"]),
            source=dict(raw["source"]),
            shards=shards,
            columns=columns,
            splits={
                name: _split(name, tables[name], _columns(url, entry, storage))
                for name, entry in columns.items()
            },
            storage=Storage(url, storage.settings, digest=str(raw["digest"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise StreamError(f"{where} is damaged: {type(error).__name__}: {error}. {_again(url)}") from error
    problems = _problems(index)
    if problems:
        raise StreamError(f"{where} is damaged: {'; '.join(problems)}. {_again(url)}")
    return index


def _columns(url: str, entry: FileEntry, storage: Storage) -> NDArray[np.uint8]:
    """A columns file as bytes: mapped into memory where it is on a disk, that of the cache included."""
    if not entry.name or "/" in entry.name or entry.name.startswith("."):
        raise ValueError(f"{entry.name!r} is no name of a columns file")
    path = storage.local_path(entry.name)
    if path is not None:
        try:
            content = _mapped(path)
        except (OSError, ValueError) as error:  # numpy refuses an empty file with a ValueError
            raise StreamError(f"{url}/{entry.name} cannot be read: {error}. {_again(url)}") from error
        _require_digest(url, entry, content)
        return content
    folder = storage.settings.cache_folder
    # Not a block of the cache: it is mapped as long as the data set is in use.
    kept = None if folder is None else Path(folder) / "columns" / entry.sha256
    if kept is not None and kept.exists():
        try:
            content = _mapped(kept)
        except (OSError, ValueError):
            content = np.zeros(0, np.uint8)
        if _digest(content) == entry.sha256:
            return content
    payload = storage.read(entry.name)
    content = np.frombuffer(payload, np.uint8)
    _require_digest(url, entry, content)
    if kept is None:
        return content
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, payload)
        return _mapped(kept)
    except OSError as error:
        _LOG.warning(
            f"{kept} cannot be written ({error}), so {entry.name} is held in memory: choose another "
            "loading.cache_folder."
        )
        return content


def _mapped(path: Path) -> NDArray[np.uint8]:
    # As a plain array: a memmap makes an object of its own for every number that is looked up.
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def _digest(content: NDArray[np.uint8]) -> str:
    return hashlib.sha256(content.data).hexdigest()


def _require_digest(url: str, entry: FileEntry, content: NDArray[np.uint8]) -> None:
    if _digest(content) != entry.sha256:
        raise StreamError(
            f"{url}/{entry.name} is damaged: it is not what {INDEX_NAME} records ({len(content)} bytes, "
            f"expected {entry.num_bytes} with sha256 {entry.sha256[:12]}...). {_again(url)}"
        )


def _split(name: str, raw: Mapping[str, Any], content: NDArray[np.uint8]) -> SplitTable:
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())
    data = content[8 + header_bytes :]
    columns: dict[str, NDArray[Any]] = {}
    for column, place in header.items():
        if column == "__metadata__":
            continue
        start, end = place["data_offsets"]
        columns[column] = data[start:end].view(_DTYPES[place["dtype"]])
        is_attribute = column.startswith(ATTRIBUTE) and place["dtype"] in ("I32", "I64")
        if not is_attribute and place["dtype"] != _PLACES[column]:
            raise ValueError(f"column {column!r} of {name!r} holds {place['dtype']}")
    return SplitTable(
        name=name,
        shard=columns["shard"],
        offset=columns["offset"],
        length=columns["length"],
        crc32=columns["crc32"],
        key_end=columns["key_end"],
        keys=columns["keys"],
        attributes={
            column.removeprefix(ATTRIBUTE): values
            for column, values in columns.items()
            if column.startswith(ATTRIBUTE)
        },
        members=tuple(str(m) for m in raw["members"]),
        classes=tuple(str(c) for c in raw["classes"]),
        groups=tuple(str(g) for g in raw["groups"]),
        cls_holds=str(raw["cls_holds"]),
    )


def _problems(index: Index) -> list[str]:
    """What contradicts itself."""
    problems = []
    if index.layout not in LAYOUTS:
        problems.append(f"layout {index.layout!r} is none of {', '.join(LAYOUTS)}")
    if index.digest != data_digest([*index.shards, *index.columns.values()]):
        problems.append("its digest is not that of its lists of files")
    for split in index.splits.values():
        problems += [f"split {split.name!r}: {problem}" for problem in _split_problems(index, split)]
    return problems


def _split_problems(index: Index, split: SplitTable) -> list[str]:
    if split.cls_holds not in CLS_HOLDS:
        return [f"cls_holds is {split.cls_holds!r}, none of {', '.join(CLS_HOLDS)}"]
    columns: list[NDArray[Any]] = [split.shard, split.offset, split.length, split.crc32, split.key_end]
    columns += split.attributes.values()
    if any(len(column) != split.num_samples for column in columns):
        return ["columns of different length"]
    if not split.num_samples:
        return []
    if split.shard.min() < 0 or split.shard.max() >= len(index.shards):
        return ["samples in shards that are not listed"]
    problems = []
    ends = np.array([shard.num_bytes for shard in index.shards])[split.shard]
    if split.offset.min() < 0 or split.length.min() <= 0:
        problems.append("negative offsets or lengths")
    elif (split.length > ends - split.offset).any():
        problems.append("samples beyond the end of their shards")
    if split.key_end[-1] != len(split.keys) or split.key_end[0] < 0 or (np.diff(split.key_end) < 0).any():
        problems.append("keys that do not fit their bytes")
    needed = {"classes": "class", "groups": "group"}.get(index.layout)
    if needed is not None and needed not in split.attributes:
        problems.append(f"no column {needed!r}")
    for attribute, names in (("class", split.classes), ("group", split.groups)):
        rows_of = split.attributes.get(attribute)
        if rows_of is not None and (rows_of.min() < 0 or rows_of.max() >= len(names)):
            problems.append(f"samples of a {attribute} that is not listed")
    return problems
