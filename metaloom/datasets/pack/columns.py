"""Records to samples: which columns are input, target and group, and what they become."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.pack import payloads
from metaloom.datasets.pack.payloads import Limits, npy_bytes
from metaloom.datasets.pack.plan import BadSample, Content, Division, fit_for_key, require_split_name
from metaloom.datasets.pack.ready_episodes import (
    PARTS,
    ExampleForm,
    episode_members,
    examples_of,
    json_bytes,
)
from metaloom.errors import StreamError

TASKS = {
    "classification": "classes",
    "regression": "groups",
    "language-modelling": "documents",
    "episodes": "episodes",
}
KINDS = ("text", "numbers", "tokens", "image", "array", "record")
_DIVIDED_BY = ("class", "group", "sample")
_ONE_GROUP = "all"


@dataclass(frozen=True)
class Columns:
    """What the columns of records are for.

    Args:
        inputs: names. Several are numbers that become one array (or, of kind `record`, one JSON object).
        targets: the label's column (classification) or those of numbers (regression).
        task: of `TASKS`, which says the layout. For `episodes` a record has lists `support` and `query`, and
            inputs and targets are the names that their examples have.
        kind: of `KINDS`; None is found out from the first record: text, an image of bytes, or numbers.
        group: column of the user, domain or corruption.
        split: column of the split's name.
        key: column of the keys; None numbers the records.
        keep: columns that are kept as JSON beside the sample.
        tokenizer: file of a tokenizer, by which texts become tokens; None leaves them as UTF-8.
        image_size: as `payloads.image_member`.
        shares: of splits; None where a column or the file names say the split, or all is train.
        divided_by: what shares are dealt to: `class`, `group` or `sample`; None is class for classification,
            else group where there is one, else sample.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    task: str = "classification"
    kind: str | None = None
    group: str | None = None
    split: str | None = None
    key: str | None = None
    keep: tuple[str, ...] = ()
    tokenizer: str | None = None
    image_size: int | None = None
    shares: Mapping[str, float] | None = None
    divided_by: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def layout(self) -> str:
        return TASKS[self.task]

    @property
    def described_by(self) -> tuple[str, ...]:
        """Columns that a sample's description needs."""
        labels = self.targets if self.task == "classification" else ()
        return tuple(
            dict.fromkeys([*labels, *(c for c in (self.group, self.split, self.key) if c is not None)])
        )

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that records must have."""
        if self.task == "episodes":
            return (*self.described_by, *PARTS)
        return tuple(dict.fromkeys([*self.inputs, *self.targets, *self.described_by, *self.keep]))

    @property
    def examples(self) -> ExampleForm:
        """Of ready episodes."""
        return ExampleForm(self.inputs[0], self.targets[0], self.kind, self.tokenizer)

    @property
    def says_split(self) -> bool:
        """Whether the split follows from a column or shares, not from the names of files."""
        return self.split is not None or self.shares is not None

    @property
    def division(self) -> Division | None:
        if self.shares is None:
            return None
        by = "class" if self.task == "classification" else "sample" if self.group is None else "group"
        return Division(self.shares, self.divided_by or by)

    def origin(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {
            "task": self.task,
            "inputs": list(self.inputs),
            "targets": list(self.targets),
            "input_kind": self.kind,
            "group": self.group,
            "split": self.split,
            "key": self.key,
            "keep": list(self.keep),
            "tokenizer": None if self.tokenizer is None else Path(self.tokenizer).name,
            "image_size": self.image_size,
            "shares": None if self.shares is None else dict(self.shares),
            "divided_by": None if self.division is None else self.division.by,
        }


def require_columns(columns: Columns, there: Sequence[str], place: str) -> None:
    """Returns if all columns that are needed are there.

    Raises:
        StreamError: names those that are not.
    """
    for name in columns.needed:
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise StreamError(f"{place} has no column {name!r}; it has {', '.join(there)}.{hint}")


def with_kind(columns: Columns, record: Mapping[str, Any], place: str) -> Columns:
    """The columns with the kind of input that a record shows.

    Raises:
        StreamError: it shows none; or options were given that this kind has no use for.
    """
    if columns.kind is not None:
        return columns
    if columns.task == "episodes":
        try:
            value = examples_of(record, PARTS[0], columns.examples, has_targets=False)[0][0]
        except BadSample as error:
            raise StreamError(f"{place}: {error}. This was the first record.") from error
    else:
        value = record[columns.inputs[0]]
    kind = "numbers"
    if len(columns.inputs) == 1:
        if isinstance(value, str):
            # A CSV file has text alone: what reads as a number is meant as one.
            kind = "numbers" if columns.task != "language-modelling" and _is_number(value) else "text"
        elif isinstance(value, Mapping) and {*value} == {"bytes", "path"}:
            kind = "image"
        elif columns.task == "language-modelling" and isinstance(value, list):
            kind = "tokens"
        elif value is None or isinstance(value, bytes | bool | Mapping):
            raise StreamError(
                f"{place}: column {columns.inputs[0]!r} holds {type(value).__name__}, which does not say "
                f"what the input is; say it by --input-kind {'|'.join(KINDS)}."
            )
    return replace(columns, kind=kind)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def content(record: Mapping[str, Any], columns: Columns, root: Path) -> Content:
    """The members of a record's sample, and its attributes besides class and group.

    Args:
        columns: their kind is known.
        root: the folder below which files lie that records name.

    Raises:
        BadSample: a column is missing, or does not hold what it should.
    """
    for name in columns.needed:
        if name not in record:
            raise BadSample(f"has no {name!r}; it has {', '.join(map(str, record))}")
    if columns.task == "episodes":
        return Content(episode_members(record, columns.examples))
    members = _input_members(record, columns, root)
    kept: dict[str, Any] = {name: record[name] for name in columns.keep}
    if columns.kind == "record":
        kept |= {name: record[name] for name in columns.inputs}
    if kept:
        members["json"] = json_bytes(kept)
    if columns.task == "regression":
        values = [_scalar(record, name) for name in columns.targets]
        members["target.npy"] = npy_bytes(np.array(values, "<f4"))
    attributes = {}
    if columns.layout == "documents":
        attributes["size"] = _document_size(members)
    return Content(members, attributes)


def description(
    record: Mapping[str, Any], columns: Columns, *, number: int, file_key: str, file_split: str
) -> tuple[str, str, str, str]:
    """(key, label, group, split) of a record.

    Args:
        number: of the record in its file, from 0.
        file_key: begins the keys of the file's records.
        file_split: where its records go unless a column says otherwise.

    Raises:
        BadSample: a column is missing or empty.
    """
    named = {name: _name(record, name) for name in columns.described_by}
    key = f"{file_key}/{number:08d}" if columns.key is None else fit_for_key(named[columns.key])
    group = "" if columns.group is None else named[columns.group]
    label = named[columns.targets[0]] if columns.task == "classification" else ""
    if columns.task == "regression":
        group = group or _ONE_GROUP
    split = file_split
    if columns.split is not None:
        split = _split_name(named[columns.split])
    return key, label, group, split


def _split_name(name: str) -> str:
    try:
        return require_split_name(name, "its split")
    except StreamError as error:
        raise BadSample(str(error).rstrip(".")) from error


def _check_options(columns: Columns) -> None:
    task = columns.task
    problems = []
    if task not in TASKS:
        raise StreamError(f"--task {task} is none of {', '.join(TASKS)}.")
    if columns.kind is not None and columns.kind not in KINDS:
        raise StreamError(f"--input-kind {columns.kind} is none of {', '.join(KINDS)}.")
    if not columns.inputs:
        problems.append("--input names no column; name the one (or those) that a model is to see")
    if task == "classification" and len(columns.targets) != 1:
        problems.append("classification needs one --target, the column of the label")
    if task == "regression" and not columns.targets:
        problems.append("regression needs --target, the column (or columns) of the numbers")
    if task == "language-modelling" and columns.targets:
        problems.append("language modelling has no --target; the next token is the target")
    if task == "episodes" and (len(columns.inputs) != 1 or len(columns.targets) != 1 or columns.keep):
        problems.append(
            "ready episodes have one --input and one --target, the names that their examples have, and keep "
            "everything else without --keep"
        )
    allowed = {"language-modelling": ("text", "tokens"), "episodes": ("text", "tokens", "numbers")}
    if columns.kind is not None and columns.kind not in allowed.get(task, KINDS):
        problems.append(
            f"--input-kind {columns.kind} is nothing for --task {task}: {', '.join(allowed[task])}"
        )
    if len(columns.inputs) > 1 and columns.kind not in (None, "numbers", "record"):
        problems.append(f"several --input are numbers or a record, not {columns.kind}")
    if columns.tokenizer is not None and columns.kind not in (None, "text"):
        problems.append(f"--tokenizer is for text, and the input is {columns.kind}")
    if columns.image_size is not None and columns.kind not in (None, "image"):
        problems.append(f"--image-size is for images, and the input is {columns.kind}")
    if columns.image_size is not None and columns.image_size < 1:
        problems.append(f"--image-size is {columns.image_size}; it must be at least 1")
    if columns.shares is None and columns.divided_by is not None:
        problems.append(
            "--split-by says what shares are dealt to; give shares, as in --split train=0.8,test=0.2"
        )
    if columns.divided_by not in (None, *_DIVIDED_BY):
        problems.append(f"--split-by {columns.divided_by} is none of {', '.join(_DIVIDED_BY)}")
    if columns.divided_by == "group" and columns.group is None:
        problems.append("--split-by group needs --group")
    if columns.divided_by == "class" and task != "classification":
        problems.append("--split-by class is for classification")
    if problems:
        raise StreamError("; ".join(problems) + ".")


def _name(record: Mapping[str, Any], column: str) -> str:
    """What a column says, as a name."""
    value = record.get(column)
    if value is None or value == "" or isinstance(value, list | Mapping | bytes):
        shown = "nothing" if value is None or value == "" else type(value).__name__
        raise BadSample(f"has {shown} in column {column!r}, which needs a name")
    name = str(value)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"its {column!r} is not UTF-8") from error
    return name


def _input_members(record: Mapping[str, Any], columns: Columns, root: Path) -> dict[str, bytes]:
    value = record[columns.inputs[0]]
    if columns.kind == "record":
        return {}
    if columns.kind == "text":
        text = payloads.text(value)
        if columns.tokenizer is None:
            return {"txt": text.encode()}
        return {"tokens.npy": npy_bytes(payloads.encode_text(text, columns.tokenizer))}
    if columns.kind == "tokens":
        return {"tokens.npy": npy_bytes(payloads.tokens(value))}
    if columns.kind == "image":
        extension, payload = payloads.image_member(
            _payload(value, root, columns.limits), size=columns.image_size, limits=columns.limits
        )
        return {extension: payload}
    if columns.kind == "array":
        return {"npy": payloads.array_member(_payload(value, root, columns.limits))}
    if len(columns.inputs) > 1:
        return {"npy": npy_bytes(np.array([_scalar(record, name) for name in columns.inputs], "<f4"))}
    try:
        return {"npy": npy_bytes(np.atleast_1d(payloads.numbers(value)))}
    except BadSample as error:
        if not isinstance(value, str):
            raise
        # The kind may be taken from the first record alone, whose text happened to be a number.
        raise BadSample(
            f"column {columns.inputs[0]!r}: {error}; if it holds text, say so by --input-kind text"
        ) from error


def _scalar(record: Mapping[str, Any], column: str) -> np.float32:
    try:
        number = payloads.numbers(record[column])
        if number.ndim:
            raise BadSample(f"is a list of {len(number)}, not one number")
    except BadSample as error:
        raise BadSample(f"column {column!r}: {error}") from error
    return np.float32(number)


def _payload(value: Any, root: Path, limits: Limits) -> bytes:
    """The bytes that a record holds, or those of the file that it names."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        if len(value) > limits.max_sample_bytes:
            raise BadSample(payloads.too_large(len(value), limits.max_sample_bytes))
        return value
    if not isinstance(value, str) or not value:
        raise BadSample(f"holds {type(value).__name__} where the name of a file should be")
    try:
        path = (root / value).resolve()
        is_inside = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise BadSample(f"names the file {value!r}, which is no path: {error}") from error
    if not is_inside:
        raise BadSample(f"names the file {value!r}, which does not lie below {root.name or root} (--root)")
    try:
        return payloads.read_file(path, limits)
    except BadSample as error:
        raise BadSample(f"{value!r} {error}") from error


def _document_size(members: Mapping[str, bytes]) -> int:
    if "txt" in members:
        return len(members["txt"])
    return len(_array(members["tokens.npy"]))


def _array(payload: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(payload), allow_pickle=False)
    return array
