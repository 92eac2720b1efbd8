"""Which files of a task are support, and which are query."""

from __future__ import annotations

from pathlib import Path

from metaloom.errors import StreamError

QUERY_NAMES = ("query", "test")


def parts_of(task: Path, query: Path | None) -> tuple[Path, Path | None]:
    """(support, query); no query where it is to be held out.

    A folder with `support` and `query` (or `test`), each a folder or a file such as `query.jsonl`, has both.

    Raises:
        StreamError: something is not there, or there are two of a part.
    """
    for path in (task, query):
        if path is not None and not path.exists():
            raise StreamError(f"there is no {path}.")
    if not task.is_dir():
        return task, query
    named = {name: _called(task, name) for name in ("support", *QUERY_NAMES)}
    support = named.pop("support")
    found = [path for path in named.values() if path is not None]
    if support is None or not found:
        return task, query
    if query is not None:
        raise StreamError(f"{task} has a query part already, {found[0].name}: leave --query out.")
    if len(found) > 1:
        raise StreamError(f"{task} has both {' and '.join(path.name for path in found)}: keep one of them.")
    return support, found[0]


def _called(folder: Path, name: str) -> Path | None:
    """The folder or file of a name, without its extension."""
    found = [path for path in sorted(folder.iterdir()) if path.stem == name]
    if len(found) > 1:
        raise StreamError(f"{folder} has both {' and '.join(path.name for path in found)}: keep one of them.")
    return found[0] if found else None
