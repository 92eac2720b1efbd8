"""Rows of Arrow stream files, mapped into memory: any row can be read without those before it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.pack import columns as of_columns
from metaloom.datasets.pack.columns import Columns
from metaloom.datasets.pack.plan import BadSample, Broken, Content, Item, Plan, SampleMaker, arrange
from metaloom.datasets.pack.records import NamedFile
from metaloom.errors import StreamError


@dataclass(frozen=True)
class ArrowFile:
    """An Arrow stream file, and what is said of it: `shown` is what a person knows it as."""

    named: NamedFile
    shown: str


def plan_rows(
    files: Sequence[ArrowFile],
    columns: Columns,
    *,
    class_names: Mapping[str, Sequence[str]],
    root: Path,
    kind: str,
) -> Plan:
    """All rows of some files.

    Args:
        class_names: of columns that hold numbers of classes.
        root: the folder below which files lie that rows name.
        kind: of the source.

    Raises:
        StreamError: a file cannot be read, has no rows, or lacks a column.
    """
    maker_files = {file.named.path: file.shown for file in files}
    known = columns
    for file in files:
        batches, names = _opened(file.named.path)
        of_columns.require_columns(columns, names, file.shown)
        if known.kind is None and batches:
            first = _Rows(file.named.path, columns.needed, class_names).read(0, 0)
            known = of_columns.with_kind(columns, first, f"{file.shown}, row 1")
    if not any(_opened(file.named.path)[0] for file in files):
        raise StreamError(f"{root}: there are no rows.")
    maker = ArrowMaker(known, str(root), maker_files, {name: tuple(n) for name, n in class_names.items()})
    broken: list[Broken] = []
    splits = arrange(
        _items(files, known, maker, broken),
        layout=known.layout,
        division=known.division,
        maker=maker,
        broken=broken,
    )
    origin = {"kind": kind, **known.origin()}
    return Plan(known.layout, known.task == "classification", splits, maker, origin, broken)


@dataclass(frozen=True)
class ArrowMaker(SampleMaker):
    """Reads rows where their descriptions say: (record batch, row in it, row in the file)."""

    columns: Columns
    root: str
    shown: dict[str, str]
    class_names: dict[str, tuple[str, ...]]

    def place(self, item: Item) -> str:
        return f"{self.shown[item.file]}, row {item.at[2] + 1}"

    def content(self, item: Item) -> Content:
        batch, row, _ = item.at
        wanted = self.columns.needed
        if self.columns.task == "episodes":
            wanted = _opened(item.file)[1]  # what else an episode has is kept
        record = _Rows(item.file, wanted, self.class_names).read(batch, row)
        return of_columns.content(record, self.columns, Path(self.root))


@dataclass(frozen=True)
class _Rows:
    """Rows of one file, of some columns, numbers of classes as their names."""

    path: str
    wanted: Sequence[str]
    class_names: Mapping[str, Sequence[str]]

    def read(self, batch: int, row: int) -> dict[str, Any]:
        """One row of a record batch.

        Raises:
            BadSample: it holds what is no number of a class, or cannot be read.
        """
        import pyarrow

        try:
            part = _opened(self.path)[0][batch].select(list(self.wanted)).slice(row, 1)
            part.validate(full=True)  # offsets that point elsewhere would be followed
            record: dict[str, Any] = part.to_pylist()[0]
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise BadSample(f"cannot be read: {error}") from error
        for column, names in self.class_names.items():
            if column in record:
                record[column] = _class_name(record[column], names, column)
        return record


def _class_name(value: Any, names: Sequence[str], column: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise BadSample(f"has the label {value!r} in column {column!r}, which has {len(names)} classes")
    return names[value]


def _items(
    files: Sequence[ArrowFile], columns: Columns, maker: ArrowMaker, broken: list[Broken]
) -> Iterator[Item]:
    for file in files:
        named = file.named
        rows = _Rows(named.path, columns.described_by, maker.class_names)
        number = -1
        for batch, part in enumerate(_opened(named.path)[0]):
            for row in range(part.num_rows):
                number += 1
                item = Item("", named.path, (batch, row, number), "", "", "")
                try:
                    record = rows.read(batch, row) if columns.described_by else {}
                    key, label, group, split = of_columns.description(
                        record, columns, number=number, file_key=named.key, file_split=named.split
                    )
                except BadSample as error:
                    broken.append(Broken(maker.place(item), str(error)))
                    continue
                yield Item(key, named.path, item.at, label, group, split)


def class_names_of(features: Any) -> dict[str, tuple[str, ...]]:
    """Names of classes by column, of the features that the library `datasets` writes beside its data."""
    if not isinstance(features, Mapping):
        return {}
    return {
        str(column): tuple(str(name) for name in feature["names"])
        for column, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def features_in(schema: Any) -> Any:
    """The features that the library `datasets` has left in a schema; None if there are none."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def schema_of(path: str) -> Any:
    """The schema of an Arrow stream file.

    Raises:
        StreamError: it is none.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(path) as source, pyarrow.ipc.open_stream(source) as stream:
            return stream.schema
    except (pyarrow.ArrowException, OSError) as error:
        raise StreamError(f"{path} is no Arrow stream file: {error}.") from error


def _opened(path: str) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """(record batches, names of columns); nothing but their headers is read."""
    status = os.stat(path)
    return _opened_as_it_is(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _opened_as_it_is(path: str, num_bytes: int, time_ns: int) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    import pyarrow

    try:
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(path))
        return tuple(stream), tuple(stream.schema.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise StreamError(f"{path} is no whole Arrow stream file: {error}.") from error
