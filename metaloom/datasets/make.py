"""Making the built-in data sets: `metaloom data make glyphs|stdlib DIR`."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets import glyphs, stdlib_code
from metaloom.datasets.index import INDEX_NAME, Index
from metaloom.datasets.shards import SplitSamples, write_shards
from metaloom.datasets.verify import verify_sizes
from metaloom.errors import StreamError

DATASETS = ("glyphs", "stdlib")
_OWN_FILES = re.compile(
    r"((train|validation|test|rehearsal)(-\d{5}\.tar|\.columns)|index\.json)(\.\d+\.partial)?"
)


@dataclass(frozen=True, eq=False)
class MadeDataset:
    """A data set that is there now, and what it took.

    `num_classes` is empty for stdlib, of which every sample (module) is a task of its own.
    """

    index: Index
    created: bool  # False if an identical, complete one was already there
    num_samples: Mapping[str, int]  # by split
    num_classes: Mapping[str, int]  # by split
    num_bytes: int  # of all shards
    seconds: float


def make_dataset(
    name: str,
    directory: str | os.PathLike[str],
    *,
    max_per_split: int | None = None,
    shard_limit_bytes: int = 16 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> MadeDataset:
    """The built-in data set, made in a local directory unless an identical, complete one is there.

    Args:
        name: glyphs or stdlib.
        directory: a local directory; it is created if need be. To use the set from elsewhere, copy it.
        max_per_split: the most classes (glyphs) or modules (stdlib) of each split, for quick tests; None for
            all.
        shard_limit_bytes: shards are begun anew when they would exceed this size.
        progress: called with (samples written, samples in all).

    Raises:
        StreamError: there is no such data set; the directory holds something else; it cannot be written to.
    """
    start = time.perf_counter()
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise StreamError(f"There is no built-in data set {name!r}; there are {', '.join(DATASETS)}.{hint}")
    if max_per_split is not None and max_per_split < 1:
        raise StreamError(f"max_per_split is {max_per_split}; it must be at least 1.")
    if "://" in os.fspath(directory):
        raise StreamError(
            f"{os.fspath(directory)}: data sets are made in a local directory; make it there and copy it."
        )
    path = Path(directory)
    present = _present(path, name)
    origin, build = _plan(name, max_per_split)
    origin["shard_limit_bytes"] = shard_limit_bytes
    if present is not None:
        _require_same(present, name, origin)
        if _is_complete(present):
            return _summary(present, created=False, start=start)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / INDEX_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise StreamError(
            f"{path}: the data set cannot be written: {error}. Choose a directory that can be written to."
        ) from error
    splits, total = build()
    index = write_shards(
        path,
        splits,
        dataset=name,
        layout="classes" if name == "glyphs" else "documents",
        source=origin,
        shard_limit_bytes=shard_limit_bytes,
        progress=None if progress is None else lambda done: progress(done, total),
    )
    _delete_leftovers(path, index)
    return _summary(index, created=True, start=start)


def _plan(
    name: str, max_per_split: int | None
) -> tuple[dict[str, Any], Callable[[], tuple[dict[str, SplitSamples], int]]]:
    """What decides the data, and the work that makes the samples and counts them."""
    if name == "glyphs":

        def build_glyphs() -> tuple[dict[str, SplitSamples], int]:
            made = glyphs.make_glyphs(max_classes_per_split=max_per_split)
            return glyphs.split_samples(made), len(made.characters) * len(made.faces)

        return glyphs.source(max_classes_per_split=max_per_split), build_glyphs

    modules = stdlib_code.make_stdlib(max_modules_per_split=max_per_split)

    def build_stdlib() -> tuple[dict[str, SplitSamples], int]:
        return stdlib_code.split_samples(modules), sum(map(len, modules.values()))

    return stdlib_code.source(modules, max_modules_per_split=max_per_split), build_stdlib


def _present(path: Path, name: str) -> Index | None:
    """The data set that the directory holds, None if it holds nothing or an unfinished one.

    Raises:
        StreamError: the directory is no directory, or holds other things.
    """
    try:
        entries = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StreamError(f"{path} cannot be used as the directory of a data set: {error}.") from error
    foreign = [entry for entry in entries if not _OWN_FILES.fullmatch(entry)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise StreamError(
            f"{path} holds other files ({shown}); {name} needs a directory of its own. Choose another one."
        )
    return Index.load(path) if INDEX_NAME in entries else None


def _require_same(present: Index, name: str, origin: Mapping[str, Any]) -> None:
    """Raises StreamError unless the data set that is there was made from the same things."""
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


def _is_complete(index: Index) -> bool:
    try:
        verify_sizes(index)
    except StreamError:
        return False
    return True


def _delete_leftovers(path: Path, index: Index) -> None:
    """Removes shards of an earlier, interrupted making that this one did not overwrite."""
    files = [*index.shards, *index.columns.values()]
    wanted = {INDEX_NAME, *(file.name for file in files)}
    for entry in path.iterdir():
        if entry.name not in wanted and _OWN_FILES.fullmatch(entry.name):
            entry.unlink()


def _summary(index: Index, *, created: bool, start: float) -> MadeDataset:
    return MadeDataset(
        index=index,
        created=created,
        num_samples={name: split.num_samples for name, split in index.splits.items()},
        num_classes={name: len(split.classes) for name, split in index.splits.items() if split.classes},
        num_bytes=sum(shard.num_bytes for shard in index.shards),
        seconds=time.perf_counter() - start,
    )
