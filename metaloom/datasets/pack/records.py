"""Records of CSV, TSV and JSONL files: a record's place in its file is found once, its content read later."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.pack import columns as of_columns
from metaloom.datasets.pack.columns import Columns
from metaloom.datasets.pack.images import files_under
from metaloom.datasets.pack.payloads import too_large
from metaloom.datasets.pack.plan import (
    BadSample,
    Broken,
    Content,
    Item,
    Plan,
    SampleMaker,
    Source,
    arrange,
    fit_for_key,
    split_of_file_name,
)
from metaloom.errors import StreamError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)
_BOM = b"\xef\xbb\xbf"
_ONE_FIELD_LIMIT = threading.Lock()  # the csv module has one limit for all of a process


@dataclass(frozen=True)
class NamedFile:
    """A file of records: what its records' keys begin with, and the split that its name tells."""

    path: str
    key: str
    split: str


@dataclass(frozen=True)
class Row:
    """One record: where it stands in its file (in bytes, and as a person counts lines), and what it says.

    `record` is None where it was not asked for, `reason` says why it cannot be read.
    """

    start: int
    num_bytes: int
    line: int
    record: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class Records(Source):
    """Records of some files.

    Args:
        paths: files, and folders of files, in UTF-8: CSV and TSV with a line of names, or a JSON object a
            line.
        root: the folder below which files lie that records name; None is that of the first path.
    """

    paths: tuple[Path, ...]
    columns: Columns
    root: Path | None = None

    def plan(self, directory: Path) -> Plan:
        files = named_files(self.paths, SUFFIXES, tells_split=not self.columns.says_split)
        heads = {file.path: _head(file.path, self.columns) for file in files}
        columns = self._with_kind(files, heads)
        root = self.root or (self.paths[0] if self.paths[0].is_dir() else self.paths[0].parent)
        maker = RecordMaker(columns, str(root), heads)
        broken: list[Broken] = []
        splits = arrange(
            self._items(files, heads, columns, maker, broken),
            layout=columns.layout,
            division=columns.division,
            maker=maker,
            broken=broken,
        )
        origin = {"kind": "records", **columns.origin()}
        return Plan(columns.layout, columns.task == "classification", splits, maker, origin, broken)

    def _with_kind(self, files: Sequence[NamedFile], heads: dict[str, tuple[str, ...]]) -> Columns:
        """The columns with the kind of input that the first record that can be read shows."""
        first_broken = ""
        for file in files:
            for row in rows_of(file.path, heads[file.path], self.columns.limits.max_sample_bytes):
                place = f"{Path(file.path).name}, line {row.line}"
                first_broken = first_broken or f"; the first one, {place}: {row.reason}"
                if row.record is not None:
                    of_columns.require_columns(self.columns, list(row.record), place)
                    return of_columns.with_kind(self.columns, row.record, place)
        paths = ", ".join(map(str, self.paths))
        raise StreamError(f"{paths}: there is no record that can be read{first_broken}.")

    def _items(
        self,
        files: Sequence[NamedFile],
        heads: dict[str, tuple[str, ...]],
        columns: Columns,
        maker: RecordMaker,
        broken: list[Broken],
    ) -> Iterator[Item]:
        limit = columns.limits.max_sample_bytes
        for file in files:
            is_described = bool(columns.described_by)
            rows = rows_of(file.path, heads[file.path], limit, is_parsed=is_described)
            for number, row in enumerate(rows):
                item = Item("", file.path, (row.start, row.num_bytes, row.line), "", "", "")
                try:
                    if row.reason is not None:
                        raise BadSample(row.reason)
                    key, label, group, split = of_columns.description(
                        row.record or {}, columns, number=number, file_key=file.key, file_split=file.split
                    )
                except BadSample as error:
                    broken.append(Broken(maker.place(item), str(error)))
                    continue
                yield Item(key, file.path, item.at, label, group, split)


@dataclass(frozen=True)
class RecordMaker(SampleMaker):
    """Reads records where their descriptions say."""

    columns: Columns
    root: str
    heads: dict[str, tuple[str, ...]]

    def place(self, item: Item) -> str:
        return f"{Path(item.file).name}, line {item.at[2]}"

    def content(self, item: Item) -> Content:
        start, num_bytes, _ = item.at
        try:
            with open(item.file, "rb") as file:
                file.seek(start)
                payload = file.read(num_bytes)
        except OSError as error:
            raise BadSample(f"cannot be read: {error}") from error
        head = self.heads[item.file]
        record = _parse_json(payload) if not head else _parse_csv(payload, head, _delimiter(item.file))
        return of_columns.content(record, self.columns, Path(self.root))


def named_files(paths: Sequence[Path], suffixes: Sequence[str], *, tells_split: bool) -> list[NamedFile]:
    """The files that some paths, of files and folders, stand for.

    Args:
        tells_split: whether names such as `train.jsonl` say the split; otherwise all is train.

    Raises:
        StreamError: there are none, one is of another kind, or only some names tell a split.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [path / name for name in files_under(path) if Path(name).suffix.lower() in suffixes]
        elif path.suffix.lower() not in suffixes:
            raise StreamError(f"{path} is none of {', '.join(suffixes)}; its name has to say which it is.")
        elif not path.is_file():
            raise StreamError(f"there is no file {path}.")
        else:
            found.append(path)
    if not found:
        raise StreamError(f"{', '.join(map(str, paths))}: there are no files {', '.join(suffixes)}.")
    split_of = {path: split_of_file_name(path.name) if tells_split else None for path in found}
    silent = [path.name for path, split in split_of.items() if split is None]
    if silent and len(silent) < len(found):
        raise StreamError(
            f"some files are called like a split and others are not ({', '.join(silent[:3])}); call all "
            f"files such as train.jsonl or test-00001.parquet, or give --split."
        )
    folder = Path(os.path.commonpath([path.absolute().parent for path in found]))
    return [
        NamedFile(str(path), _file_key(path, folder), split_of[path] or "train")
        for path in dict.fromkeys(found)
    ]


def rows_of(path: str, head: tuple[str, ...], max_bytes: int, *, is_parsed: bool = True) -> Iterator[Row]:
    """The records of a file, in order; of one that cannot be read, the reason.

    Args:
        head: names of the columns; empty for JSON.
        max_bytes: of one record.
        is_parsed: whether to look into JSON; CSV has to be in any case.

    Raises:
        StreamError: the file cannot be read.
    """
    try:
        if head:
            yield from _csv_rows(path, head, max_bytes)
        else:
            yield from _json_rows(path, max_bytes, is_parsed)
    except OSError as error:
        raise StreamError(f"{path} cannot be read: {error.strerror or error}.") from error


def _file_key(path: Path, folder: Path) -> str:
    relative = path.absolute().relative_to(folder)
    try:
        return fit_for_key(relative.with_suffix("").as_posix())
    except BadSample as error:
        raise StreamError(f"{path!r}: {error}; rename the file.") from error


def _head(path: str, columns: Columns) -> tuple[str, ...]:
    """The names of a CSV file's columns; empty for JSON."""
    if Path(path).suffix.lower() in JSON_SUFFIXES:
        return ()
    if columns.task == "episodes":
        raise StreamError(
            f"{path}: ready episodes are lists, which CSV has no form for; write them as JSONL."
        )
    try:
        with open(path, "rb") as file, _field_limit(columns.limits.max_sample_bytes):
            lines = _Lines(file, columns.limits.max_sample_bytes)
            names = next(csv.reader(lines, delimiter=_delimiter(path), strict=True), [])
    except (OSError, csv.Error) as error:
        raise StreamError(f"{path}: its line of column names cannot be read: {error}.") from error
    if lines.num_too_long or not names or len({*names}) < len(names) or _has_surrogates(names):
        raise StreamError(
            f"{path}: its first line must have the names of the columns, each once, in UTF-8; it has "
            f"{', '.join(map(ascii, names[:10])) or 'nothing'}."
        )
    of_columns.require_columns(columns, names, Path(path).name)
    return tuple(names)


def _delimiter(path: str) -> str:
    return DELIMITERS[Path(path).suffix.lower()]


class _Lines(Iterator[str]):
    """The lines of a file for the csv module, which asks for one at a time; counts bytes and lines.

    Bytes that are no UTF-8 come as surrogates. Of a line that is longer than the limit, the first bytes come.
    """

    def __init__(self, file: io.BufferedReader, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self.num_lines = 0
        self.num_too_long = 0

    def __next__(self) -> str:
        line = self._file.readline(self._max_bytes + 1)
        if not line:
            raise StopIteration
        length = len(line)
        if length > self._max_bytes and not line.endswith(b"\n"):
            self.num_too_long += 1
            length += _skip_line(self._file)
        if self.num_bytes == 0:
            line = line.removeprefix(_BOM)
        self.num_bytes += length
        self.num_lines += 1
        return line.decode(errors="surrogateescape")


def _csv_rows(path: str, head: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    with open(path, "rb") as file:
        lines = _Lines(file, max_bytes)
        reader = csv.reader(lines, delimiter=_delimiter(path), strict=True)
        with _field_limit(max_bytes):
            next(reader)
        while True:
            start, line, num_too_long = lines.num_bytes, lines.num_lines + 1, lines.num_too_long
            reason: str | None = None
            fields: list[str] = []
            try:
                with _field_limit(max_bytes):
                    fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = f"is no CSV: {error}"
            num_bytes = lines.num_bytes - start
            if lines.num_too_long > num_too_long or num_bytes > max_bytes:
                reason = too_large(num_bytes, max_bytes)
            if reason is None and not fields:
                continue  # an empty line
            reason = reason or _row_problem(fields, head)
            record = None if reason else dict(zip(head, fields, strict=True))
            yield Row(start, num_bytes, line, record, reason)


def _row_problem(fields: list[str], head: tuple[str, ...]) -> str | None:
    if len(fields) != len(head):
        return f"has {len(fields)} fields; the first line names {len(head)}"
    if _has_surrogates(fields):
        return "is not UTF-8"
    return None


def _has_surrogates(fields: Sequence[str]) -> bool:
    return any("\ud800" <= letter <= "\udfff" for field in fields if not field.isascii() for letter in field)


def _parse_csv(payload: bytes, head: tuple[str, ...], delimiter: str) -> dict[str, Any]:
    with _field_limit(max(len(payload), 1)):
        text = payload.decode(errors="surrogateescape")
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise BadSample(f"is no CSV: {error}") from error
    fields = rows[0] if len(rows) == 1 else []
    problem = _row_problem(fields, head)
    if problem is not None:
        raise BadSample(problem)
    return dict(zip(head, fields, strict=True))


def _json_rows(path: str, max_bytes: int, is_parsed: bool) -> Iterator[Row]:
    start = line = 0
    with open(path, "rb") as file:
        while payload := file.readline(max_bytes + 1):
            num_bytes = len(payload)
            line += 1
            record, reason = None, None
            if num_bytes > max_bytes and not payload.endswith(b"\n"):
                num_bytes += _skip_line(file)
                reason = too_large(num_bytes, max_bytes)
            elif is_parsed and payload.strip():
                try:
                    record = _parse_json(payload)
                except BadSample as error:
                    reason = str(error)
            if payload.strip():
                yield Row(start, num_bytes, line, record, reason)
            start += num_bytes


def _parse_json(payload: bytes) -> dict[str, Any]:
    try:
        record = json.loads(payload.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadSample(f"is a JSON {type(record).__name__}, not an object")
    return record


def _skip_line(file: io.BufferedReader) -> int:
    """The number of bytes up to and with the end of the line, which is now behind."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


@contextmanager
def _field_limit(max_bytes: int) -> Iterator[None]:
    """Fields of CSV may be so long, in place of the module's own 128 KiB."""
    with _ONE_FIELD_LIMIT:
        before = csv.field_size_limit(max_bytes)
        try:
            yield
        finally:
            csv.field_size_limit(before)
