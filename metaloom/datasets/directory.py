"""The local directory of a data set: what it may hold, and what an earlier attempt left there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaloom.datasets.index import INDEX_NAME, Index
from metaloom.errors import StreamError

SPLIT_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
# How folders and files that hold a split are called, and what the split is called then.
SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "rehearsal": "rehearsal",
}
SPOOL_NAME = "spool-{number:05d}.arrow"
_OWN_FILES = re.compile(
    rf"({SPLIT_NAME}-\d{{5}}\.tar|{SPLIT_NAME}\.columns|index\.json|spool-\d{{5}}\.arrow)(\.\d+\.partial)?"
)


def holds_index(path: Path, name: str) -> bool:
    """Whether the directory holds a data set; False if it holds nothing, or an unfinished one.

    Args:
        name: of the data set that is to lie there.

    Raises:
        StreamError: the directory is no directory, or holds other things.
    """
    try:
        entries = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StreamError(f"{path} cannot be used as the directory of a data set: {error}.") from error
    foreign = [entry for entry in entries if not _OWN_FILES.fullmatch(entry)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise StreamError(
            f"{path} holds other files ({shown}); {name} needs a directory of its own. Choose another one."
        )
    return INDEX_NAME in entries


def require_same(present: Index, name: str, origin: Mapping[str, Any]) -> None:
    """Returns if the data set that is there was made from the same things.

    Raises:
        StreamError: it was not; says in what.
    """
    advice = "Choose another directory, or delete this one to make it anew."
    if present.dataset != name:
        raise StreamError(f"{present.url} holds the data set {present.dataset!r}, not {name!r}. {advice}")
    differences = [
        f"{key} is {present.source.get(key)!r} there and {origin.get(key)!r} now"
        for key in sorted({*present.source, *origin})
        if present.source.get(key) != origin.get(key)
    ]
    if differences:
        raise StreamError(f"{present.url} holds {name} made otherwise: {'; '.join(differences)}. {advice}")


def create(path: Path) -> None:
    """The directory is there.

    Raises:
        StreamError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def begin(path: Path) -> None:
    """The directory is there, and is no finished data set any more: an index is written last.

    Raises:
        StreamError: it cannot be written to.
    """
    create(path)
    try:
        (path / INDEX_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> StreamError:
    return StreamError(
        f"{path}: the data set cannot be written: {error}. Choose a directory that can be written to."
    )


def delete_leftovers(path: Path, index: Index) -> None:
    """Removes files of an earlier, interrupted making that this one did not overwrite."""
    columns = {f"{split}.columns" for split in index.splits}
    wanted = {INDEX_NAME, *columns, *(shard.name for shard in index.shards)}
    for entry in path.iterdir():
        if entry.name not in wanted and _OWN_FILES.fullmatch(entry.name):
            entry.unlink()
